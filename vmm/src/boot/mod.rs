//! Puts a kernel and all it needs into guest memory.
//!
//! Called by `build` before the first vCPU runs. Everything it reads (kernel, initramfs, command
//! line) is hostile: an image that is out of form is a [`BootError`], never a panic. Refuses to
//! touch KVM; what the boot vCPU starts with is [`Loaded`].

mod acpi;
mod kernel;
pub(crate) mod tables;
mod zero_page;

use std::fs::File;

use mica_units::{Gpa, VcpuCount};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;
use crate::memory::GuestMemory;

pub use kernel::Loaded;

/// Why a guest could not be set up to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither a bzImage nor an ELF vmlinux.
    #[error("the kernel is neither a bzImage nor an ELF vmlinux")]
    UnknownImage,
    /// The image says it is of a kind, and is broken.
    #[error("the kernel image is broken or does not fit guest memory: {reason}")]
    BadImage {
        /// The loader's words.
        reason: String,
    },
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error("the kernel has no 64-bit entry point (boot protocol 2.12); use a newer kernel")]
    No64BitEntry,
    /// The kernel, unpacked, and the initramfs do not fit below the hole.
    #[error("kernel and initramfs need {need} bytes below 3 GiB, guest memory has {have}")]
    DoesNotFit {
        /// Bytes wanted.
        need: u64,
        /// Bytes there.
        have: u64,
    },
    /// The command line is too long, or has a zero byte in it.
    #[error("the command line must be shorter than {max} bytes and free of zero bytes")]
    Cmdline {
        /// What the kernel takes.
        max: u64,
    },
    /// Reading an image failed.
    #[error("reading the {what} failed")]
    Read {
        /// Which image.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory has no room at that address.
    #[error("writing the {what} into guest memory failed")]
    Write {
        /// What was written.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// Real-mode code at the reset vector: `mov al, 0xfe; out 0x64, al; cli; hlt`, in a circle.
///
/// Under hardware-reduced ACPI without EFI, Linux resets through the BIOS, whatever the reset register
/// says: it takes the one bit to mean that EFI is there, finds none, and falls back to this jump.
const RESET_CODE: [u8; 8] = {
    let [port, high] = layout::RESET_PORT.to_le_bytes();
    assert!(high == 0);
    [0xb0, layout::RESET_VALUE, 0xe6, port, 0xfa, 0xf4, 0xeb, 0xfd]
};

/// What to boot.
#[derive(Debug)]
pub struct Images<'a> {
    /// A bzImage or an ELF vmlinux.
    pub kernel: File,
    /// The initial RAM file system.
    pub initramfs: Option<File>,
    /// The kernel command line.
    pub cmdline: &'a str,
}

/// Loads the images and writes every boot structure.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    memory: &GuestMemory,
    mut images: Images<'_>,
    vcpus: VcpuCount,
    devices: usize,
) -> Result<Loaded, BootError> {
    let loaded = kernel::load(memory, &mut images.kernel)?;
    let initramfs = match images.initramfs {
        Some(file) => Some(kernel::load_initramfs(memory, file, &loaded)?),
        None => None,
    };
    tables::write(memory)?;
    acpi::write(memory, vcpus, devices)?;
    write(memory, "reset vector", layout::RESET_VECTOR, &RESET_CODE)?;
    let cmdline_bytes = write_cmdline(memory, images.cmdline, &loaded)?;
    zero_page::write(memory, &loaded, initramfs, cmdline_bytes)?;
    Ok(loaded)
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, loaded: &Loaded) -> Result<u32, BootError> {
    let max = loaded.cmdline_bytes_max().min(layout::CMDLINE_BYTES_MAX);
    let refused = BootError::Cmdline { max };
    let Ok(length) = u32::try_from(cmdline.len()) else { return Err(refused) };
    if u64::from(length) >= max || cmdline.contains('\0') {
        return Err(refused);
    }
    write(memory, "command line", layout::CMDLINE, cmdline.as_bytes())?;
    let end = Gpa::new(layout::CMDLINE.raw() + u64::from(length));
    write(memory, "command line", end, &[0])?;
    Ok(length)
}

fn write(memory: &GuestMemory, what: &'static str, at: Gpa, bytes: &[u8]) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(at.raw()))
        .map_err(|source| BootError::Write { what, source })
}
