//! Loads the kernel modules that came with the initramfs.
//!
//! Called by init before anything needs a disk or a socket. Refuses a list over its limit, and
//! paths: a line is a file name in `/modules`.

use std::path::Path;

use rustix::io::Errno;

use super::InitError;

/// Most lines of the list.
const MODULES_MAX: usize = 256;

/// Loads every module of `/modules/order`, in that order; a kernel that needs none has no list.
pub fn load_all() -> Result<(), InitError> {
    let list = Path::new("/modules/order");
    let text = match std::fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(InitError::at("read /modules/order")(error)),
    };
    names(&text).try_for_each(load)
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).take(MODULES_MAX)
}

fn load(name: &str) -> Result<(), InitError> {
    let step = || format!("load the kernel module {name}");
    if name.contains('/') {
        return Err(InitError::at(step())(std::io::Error::from(std::io::ErrorKind::InvalidInput)));
    }
    let file =
        std::fs::File::open(Path::new("/modules").join(name)).map_err(InitError::at(step()))?;
    match rustix::system::finit_module(&file, c"", 0) {
        // Built in, or loaded already as another's dependency.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(InitError::at(step())(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_one_name_a_line() {
        let all: Vec<&str> = names("virtio.ko\n\n  vsock.ko \n").collect();
        assert_eq!(all, ["virtio.ko", "vsock.ko"]);
        assert!(load("../x.ko").unwrap_err().to_string().contains("../x.ko"));
    }
}
