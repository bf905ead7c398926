//! System calls that have no safe wrapper elsewhere, one small function each.
//!
//! Called by `rt`, `process`, `userfault` and `memfd`. Refuses policy: bounds, loops and what an error
//! means are the callers'. Everything here is safe to call with any argument.

#![expect(unsafe_code, reason = "system calls that take addresses, and owners that change")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

/// Hands a stream socket (or any descriptor that is only polled) to glommio.
pub(crate) fn glommio_unix_stream(fd: OwnedFd) -> glommio::net::UnixStream {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor, so the stream is its only
    // owner from here on and closes it exactly once. glommio makes no assumption about the kind
    // of socket beyond calling recv and send on it, which fail cleanly on any other descriptor.
    unsafe { glommio::net::UnixStream::from_raw_fd(fd.into_raw_fd()) }
}

/// Hands a connected TCP socket to glommio.
pub(crate) fn glommio_tcp_stream(fd: OwnedFd) -> glommio::net::TcpStream {
    // SAFETY: as above: ownership moves, the descriptor is open and closed once.
    unsafe { glommio::net::TcpStream::from_raw_fd(fd.into_raw_fd()) }
}

/// The result of a system call that gives a count or sets errno.
fn counted(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A part of another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// The address of its first byte, in that process.
    pub address: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

impl RemoteRange {
    /// The form that the kernel reads. `None` where this machine's addresses are too short.
    fn to_iovec(self) -> Option<libc::iovec> {
        let address = usize::try_from(self.address).ok()?;
        let iov_len = usize::try_from(self.bytes).ok()?;
        Some(libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len })
    }
}

fn to_iovecs(ranges: &[RemoteRange]) -> io::Result<Vec<libc::iovec>> {
    let iovecs: Option<Vec<_>> = ranges.iter().map(|range| range.to_iovec()).collect();
    iovecs.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// process_vm_readv(2): copies the ranges, one behind the other, to `local`. Stops at the first page
/// that cannot be read, and says how many bytes that were.
pub(crate) fn process_vm_readv(
    pid: i32,
    local: &mut [u8],
    remote: &[RemoteRange],
) -> io::Result<usize> {
    let remote = to_iovecs(remote)?;
    let here = libc::iovec { iov_base: local.as_mut_ptr().cast(), iov_len: local.len() };
    let count = remote.len() as libc::c_ulong;
    // SAFETY: the only memory written is `local`, which is ours, exclusively borrowed and as long as
    // its iovec says; `remote` holds `count` entries, and its addresses mean something in the other
    // process only, where the kernel checks them.
    counted(unsafe { libc::process_vm_readv(pid, &raw const here, 1, remote.as_ptr(), count, 0) })
}

/// process_vm_writev(2): copies `local` to the ranges, one behind the other.
pub(crate) fn process_vm_writev(
    pid: i32,
    local: &[u8],
    remote: &[RemoteRange],
) -> io::Result<usize> {
    let remote = to_iovecs(remote)?;
    let base = local.as_ptr().cast_mut().cast();
    let here = libc::iovec { iov_base: base, iov_len: local.len() };
    let count = remote.len() as libc::c_ulong;
    // SAFETY: no memory of this process is written: the only caller refuses its own number. `local` is
    // read only, despite the pointer's type.
    counted(unsafe { libc::process_vm_writev(pid, &raw const here, 1, remote.as_ptr(), count, 0) })
}

/// Whether the process exists, be it as a zombie.
pub(crate) fn pidfd_exists(pidfd: BorrowedFd<'_>) -> bool {
    let (signal, info, flags) = (0, std::ptr::null::<libc::siginfo_t>(), 0);
    // SAFETY: signal 0 is sent to nobody, and a null siginfo is allowed.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, info, flags)
    };
    // EPERM: it exists and is another user's.
    sent == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
}

/// Words of a set of memory nodes: `MAX_NUMNODES` of x86-64 kernels, in bits.
const NODE_WORDS: usize = 16;

/// What the kernel is told of the length of such a set: it reads one bit less.
const NODE_BITS: u64 = NODE_WORDS as u64 * 64 + 1;

fn only_node(node: u32) -> io::Result<[u64; NODE_WORDS]> {
    let mut nodes = [0u64; NODE_WORDS];
    let word = nodes.get_mut((node / u64::BITS) as usize).ok_or(io::ErrorKind::InvalidInput)?;
    *word |= 1 << (node % u64::BITS);
    Ok(nodes)
}

/// A thread's memory policy, as the kernel has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadMemory {
    mode: libc::c_int,
    nodes: [u64; NODE_WORDS],
}

impl ThreadMemory {
    /// On this node only, or on it while it has room.
    pub(crate) fn on(node: u32, only: bool) -> io::Result<Self> {
        let mode = if only { libc::MPOL_BIND } else { libc::MPOL_PREFERRED };
        Ok(Self { mode, nodes: only_node(node)? })
    }

    /// What this thread has now.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        let mut policy = Self { mode: 0, nodes: [0; NODE_WORDS] };
        let (address, flags) = (std::ptr::null::<u8>(), 0);
        // SAFETY: the kernel writes the mode and as many bits as it is told there are, both ours and
        // exclusively borrowed; without flags it looks at no address.
        let got = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                NODE_BITS - 1,
                address,
                flags,
            )
        };
        if got == 0 { Ok(policy) } else { Err(io::Error::last_os_error()) }
    }

    /// set_mempolicy(2): where pages come to lie that this thread, and what it starts, asks for.
    pub(crate) fn apply(&self) -> io::Result<()> {
        // The default policy has no set, and the kernel takes none for it.
        let none = self.mode == libc::MPOL_DEFAULT;
        let nodes = if none { std::ptr::null() } else { self.nodes.as_ptr() };
        // SAFETY: the policy changes where pages come to lie, and no byte of them; the mask is null, which
        // the kernel does not read, or has as many bits as it reads.
        let set = unsafe { libc::syscall(libc::SYS_set_mempolicy, self.mode, nodes, NODE_BITS) };
        if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// mbind(2): pages that come to the range lie on `node`: nowhere else where it is `bound`, while that has room
/// otherwise.
pub(crate) fn place_on(start: usize, bytes: usize, node: u32, bound: bool) -> io::Result<()> {
    let nodes = only_node(node)?;
    let mode = if bound { libc::MPOL_BIND } else { libc::MPOL_PREFERRED };
    let bits = NODE_BITS;
    // SAFETY: the policy changes where pages come to lie, and no byte of them, whatever the range is;
    // the mask has as many bits as the kernel reads.
    let set =
        unsafe { libc::syscall(libc::SYS_mbind, start, bytes, mode, nodes.as_ptr(), bits, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One run of pages that PAGEMAP_SCAN found (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScanArguments {
    /// Of this structure: set by [`pagemap_scan`].
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Where the walk stopped: the kernel's answer.
    pub(crate) walk_end: u64,
    /// Where the regions go: set by [`pagemap_scan`].
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

/// An ioctl's number, for an argument of type `T`.
const fn ioctl_number<T>(direction: libc::Ioctl, kind: u8, number: u8) -> libc::Ioctl {
    let size = size_of::<T>() as libc::Ioctl;
    (direction << 30) | (size << 16) | ((kind as libc::Ioctl) << 8) | number as libc::Ioctl
}

/// The kernel writes its argument (`_IOR`).
const READ: libc::Ioctl = 2;
/// The kernel reads and writes its argument (`_IOWR`).
const READ_WRITE: libc::Ioctl = 3;

const PAGEMAP_SCAN: libc::Ioctl = ioctl_number::<ScanArguments>(READ_WRITE, b'f', 16);

const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// PAGEMAP_SCAN on /proc/PID/pagemap: fills `regions` and says how many.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    arguments: &mut ScanArguments,
    regions: &mut [PageRegion],
) -> io::Result<usize> {
    arguments.size = size_of::<ScanArguments>() as u64;
    arguments.vec = regions.as_mut_ptr().expose_provenance() as u64;
    arguments.vec_len = regions.len() as u64;
    // SAFETY: the kernel reads and writes `arguments`, whose layout is the kernel's (its size is part
    // of the number), and writes at most `vec_len` regions to `vec`, both ours and exclusively
    // borrowed. On any other descriptor the number is refused.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut *arguments) };
    usize::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// `struct uffdio_api` of linux/userfaultfd.h, and the others likewise.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UffdRange {
    start: u64,
    bytes: u64,
}

#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdCopy {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct UffdZeropage {
    range: UffdRange,
    mode: u64,
    zeroed: i64,
}

const UFFDIO_API: libc::Ioctl = ioctl_number::<UffdApi>(READ_WRITE, 0xaa, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = ioctl_number::<UffdRegister>(READ_WRITE, 0xaa, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = ioctl_number::<UffdRange>(READ, 0xaa, 0x01);
const UFFDIO_WAKE: libc::Ioctl = ioctl_number::<UffdRange>(READ, 0xaa, 0x02);
const UFFDIO_COPY: libc::Ioctl = ioctl_number::<UffdCopy>(READ_WRITE, 0xaa, 0x03);
const UFFDIO_ZEROPAGE: libc::Ioctl = ioctl_number::<UffdZeropage>(READ_WRITE, 0xaa, 0x04);

const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01 && UFFDIO_WAKE == 0x8010_aa02);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);

/// userfaultfd(2): non-blocking, for faults of the kernel too.
pub(crate) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor changes nothing about memory by itself. What may be done with it, and to
    // which memory, is the argument of `userfault`.
    Ok(unsafe { rustix::mm::userfaultfd(flags) }?)
}

fn uffd<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request above is paired with the type in its number, whose layout is the kernel's;
    // it reads and writes that, which is exclusively borrowed, and for UFFDIO_COPY reads bytes that the
    // caller has borrowed. On any descriptor that is no userfaultfd the numbers are refused.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Agrees with the kernel on what a userfaultfd does.
pub(crate) fn uffd_api(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    uffd(fd, UFFDIO_API, &mut UffdApi { api: 0xaa, features, ioctls: 0 })
}

/// Starts to watch a range.
pub(crate) fn uffd_register(fd: BorrowedFd<'_>, at: RemoteRange, mode: u64) -> io::Result<()> {
    let range = UffdRange { start: at.address, bytes: at.bytes };
    uffd(fd, UFFDIO_REGISTER, &mut UffdRegister { range, mode, ioctls: 0 })
}

/// Stops watching a range, and wakes who waits there.
pub(crate) fn uffd_unregister(fd: BorrowedFd<'_>, at: RemoteRange) -> io::Result<()> {
    uffd(fd, UFFDIO_UNREGISTER, &mut UffdRange { start: at.address, bytes: at.bytes })
}

/// Wakes who waits for pages of a range.
pub(crate) fn uffd_wake(fd: BorrowedFd<'_>, at: RemoteRange) -> io::Result<()> {
    uffd(fd, UFFDIO_WAKE, &mut UffdRange { start: at.address, bytes: at.bytes })
}

/// Puts pages where there are none. What was done, and why not all.
pub(crate) fn uffd_copy(
    fd: BorrowedFd<'_>,
    to: u64,
    bytes: &[u8],
    mode: u64,
) -> (u64, io::Result<()>) {
    let (from, length) = (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64);
    let mut copy = UffdCopy { to, from, bytes: length, mode, copied: 0 };
    let result = uffd(fd, UFFDIO_COPY, &mut copy);
    (u64::try_from(copy.copied).unwrap_or(0), result)
}

/// Puts the zero page where there are none. What was done, and why not all.
pub(crate) fn uffd_zeropage(fd: BorrowedFd<'_>, at: RemoteRange) -> (u64, io::Result<()>) {
    let range = UffdRange { start: at.address, bytes: at.bytes };
    let mut zeropage = UffdZeropage { range, mode: 0, zeroed: 0 };
    let result = uffd(fd, UFFDIO_ZEROPAGE, &mut zeropage);
    (u64::try_from(zeropage.zeroed).unwrap_or(0), result)
}
