//! The descriptors beside a frame, each under its role.
//!
//! Called by `build` and `restore`. Refuses descriptors that do not match their list, a role that the
//! command does not take, and a role that is there twice; layers excepted, of which there are many.

use std::os::fd::OwnedFd;

use mica_wire::vm::FdRole;

/// Why descriptors were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorsError {
    /// The list and the descriptors differ in number.
    #[error("there are more or fewer than the list says")]
    Number,
    /// A role that belongs to another command.
    #[error("{0:?} does not belong to this command")]
    Foreign(FdRole),
    /// A role that is there twice.
    #[error("a role is there twice")]
    Twice,
    /// A role without which the command means nothing.
    #[error("{0:?} is missing")]
    Missing(FdRole),
}

/// The descriptors of one command.
#[derive(Debug, Default)]
pub struct Descriptors {
    single: Vec<(FdRole, OwnedFd)>,
    layers: Vec<OwnedFd>,
}

impl Descriptors {
    /// Matches descriptors with their list. Only roles in `allowed` may be there.
    ///
    /// # Errors
    /// See [`DescriptorsError`].
    pub fn sort(
        roles: &[FdRole],
        fds: Vec<OwnedFd>,
        allowed: &[FdRole],
    ) -> Result<Self, DescriptorsError> {
        if roles.len() != fds.len() {
            return Err(DescriptorsError::Number);
        }
        let mut sorted = Self::default();
        for (role, fd) in roles.iter().copied().zip(fds) {
            if !allowed.contains(&role) {
                return Err(DescriptorsError::Foreign(role));
            }
            if role == FdRole::Layer {
                sorted.layers.push(fd);
            } else if sorted.single.iter().any(|(other, _)| *other == role) {
                return Err(DescriptorsError::Twice);
            } else {
                sorted.single.push((role, fd));
            }
        }
        Ok(sorted)
    }

    /// Takes the descriptor of a role out, if it is there.
    pub fn take(&mut self, role: FdRole) -> Option<OwnedFd> {
        let at = self.single.iter().position(|(other, _)| *other == role)?;
        Some(self.single.swap_remove(at).1)
    }

    /// Takes the descriptor of a role out.
    ///
    /// # Errors
    /// When it is not there.
    pub fn required(&mut self, role: FdRole) -> Result<OwnedFd, DescriptorsError> {
        self.take(role).ok_or(DescriptorsError::Missing(role))
    }

    /// Takes the layers out, in their order.
    pub fn take_layers(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn sort(roles: &[FdRole], count: usize) -> Result<Descriptors, DescriptorsError> {
        let allowed = [FdRole::Kernel, FdRole::Disk, FdRole::Layer];
        Descriptors::sort(roles, (0..count).map(|_| null()).collect(), &allowed)
    }

    #[test]
    fn descriptors_are_matched_by_their_list() {
        let roles = [FdRole::Layer, FdRole::Kernel, FdRole::Layer];
        let mut sorted = sort(&roles, 3).unwrap();
        assert!(sorted.required(FdRole::Kernel).is_ok());
        assert!(sorted.take(FdRole::Disk).is_none());
        assert_eq!(
            sorted.required(FdRole::Kernel).unwrap_err(),
            DescriptorsError::Missing(FdRole::Kernel)
        );
        assert_eq!(sorted.take_layers().len(), 2);
    }

    #[test]
    fn what_does_not_match_is_refused() {
        let refusals = [
            (&[FdRole::Kernel][..], 0, DescriptorsError::Number),
            (&[FdRole::Kernel], 2, DescriptorsError::Number),
            (&[FdRole::Disk, FdRole::Disk], 2, DescriptorsError::Twice),
            (&[FdRole::Stream], 1, DescriptorsError::Foreign(FdRole::Stream)),
        ];
        for (roles, count, refusal) in refusals {
            assert_eq!(sort(roles, count).unwrap_err(), refusal, "{roles:?} {count}");
        }
    }
}
