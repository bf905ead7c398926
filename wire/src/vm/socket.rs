//! The control socket, as both ends hold it.
//!
//! Called by `vmm` for both directions, and by a shard to send. Refuses a packet that was cut, and
//! more descriptors than [`FDS_PER_FRAME_MAX`]; every descriptor received is close-on-exec.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};

use super::codec::{
    FRAME_BYTES_MAX, FrameError, decode_command, decode_event, encode_command, encode_event,
};
use super::{Command, Event, LAYERS_MAX};

/// Most descriptors beside one frame: every layer, and a disk.
pub const FDS_PER_FRAME_MAX: usize = LAYERS_MAX + 1;

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The other end is gone.
    #[error("the control socket is closed")]
    Closed,
    /// A non-blocking socket has no packet, or no room for one.
    #[error("the control socket would block")]
    WouldBlock,
    /// The packet or its descriptors did not fit and were cut.
    #[error("a control packet was truncated")]
    Truncated,
    /// The bytes are not a frame.
    #[error("a control packet is not a frame")]
    Frame(#[from] FrameError),
    /// The kernel refused.
    #[error("the control socket failed")]
    Os(#[source] Errno),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::WouldBlock,
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            other => Self::Os(other),
        }
    }
}

/// One end of the socket between a shard and a VM process.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// A connected pair, both close-on-exec, both blocking.
    ///
    /// # Errors
    /// When the kernel has no descriptor to give.
    pub fn pair() -> Result<(Self, Self), SocketError> {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(a), Self(b)))
    }

    /// Takes over a descriptor that is such a socket.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Gives the descriptor up.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends a command and the descriptors that go with it.
    ///
    /// # Errors
    /// See [`SocketError`]. Nothing was sent then.
    pub fn send_command(
        &self,
        command: &Command,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SocketError> {
        self.send(&encode_command(command)?, fds)
    }

    /// Sends an event.
    ///
    /// # Errors
    /// See [`SocketError`]. Nothing was sent then.
    pub fn send_event(&self, event: &Event) -> Result<(), SocketError> {
        self.send(&encode_event(event)?, &[])
    }

    /// Waits for the next command, if the socket blocks, and takes the descriptors beside it.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn receive_command(&self) -> Result<(Command, Vec<OwnedFd>), SocketError> {
        let mut packet = vec![0; FRAME_BYTES_MAX];
        let (length, fds) = self.receive(&mut packet)?;
        Ok((decode_command(&packet[..length])?, fds))
    }

    /// Waits for the next event, if the socket blocks.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn receive_event(&self) -> Result<Event, SocketError> {
        let mut packet = vec![0; FRAME_BYTES_MAX];
        let (length, _) = self.receive(&mut packet)?;
        Ok(decode_event(&packet[..length])?)
    }

    fn send(&self, frame: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_FRAME_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(SocketError::Truncated);
        }
        let iov = [IoSlice::new(frame)];
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(&self.0, &iov, &mut control, SendFlags::NOSIGNAL)
        })?;
        if sent == frame.len() { Ok(()) } else { Err(SocketError::Truncated) }
    }

    fn receive(&self, packet: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), SocketError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_FRAME_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let mut iov = [IoSliceMut::new(packet)];
            recvmsg(&self.0, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let fds = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(rights) => Some(rights),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(SocketError::Truncated);
        }
        // A frame is never empty, so an empty packet is the end of the connection.
        if received.bytes == 0 { Err(SocketError::Closed) } else { Ok((received.bytes, fds)) }
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::Ending;
    use std::io::{Read, Write};

    #[test]
    fn descriptors_travel_beside_a_command() {
        let (shard, vm) = ControlSocket::pair().unwrap();
        let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let command = Command::OpenStream { vsock_port: 7 };
        shard.send_command(&command, &[far.as_fd()]).unwrap();
        drop(far);
        let (received, mut fds) = vm.receive_command().unwrap();
        assert_eq!(received, command);
        let mut far = std::fs::File::from(fds.pop().unwrap());
        assert!(fds.is_empty());
        far.write_all(b"hello").unwrap();
        drop(far);
        let mut text = String::new();
        near.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_closed_end_is_told_apart_from_garbage() {
        let (shard, vm) = ControlSocket::pair().unwrap();
        rustix::net::send(&vm, b"garbage!garbage!", SendFlags::empty()).unwrap();
        assert!(matches!(shard.receive_event(), Err(SocketError::Frame(_))));
        vm.send_event(&Event::Ended(Ending::Asked)).unwrap();
        drop(vm);
        assert_eq!(shard.receive_event().unwrap(), Event::Ended(Ending::Asked));
        assert!(matches!(shard.receive_event(), Err(SocketError::Closed)));
        assert!(matches!(shard.send_command(&Command::Stop, &[]), Err(SocketError::Closed)));
    }
}
