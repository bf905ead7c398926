//! Kernel and initramfs into guest memory.
//!
//! Called by `boot`. Tells a bzImage from an ELF vmlinux by their magic, nothing else. The images are
//! hostile: every size in them is checked against guest memory before it is used.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use mica_units::{Gpa, PAGE_BYTES};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use crate::layout;
use crate::memory::GuestMemory;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
const BZIMAGE_MAGIC_AT: u64 = 0x202;
/// The 64-bit entry of a bzImage, from its load address (boot protocol, "64-bit boot protocol").
const ENTRY_64_OFFSET: u64 = 0x200;
/// `XLF_KERNEL_64`: that entry exists.
const XLF_KERNEL_64: u16 = 1;
/// The protocol that has `init_size` and `xloadflags`.
const PROTOCOL_MIN: u16 = 0x20c;
/// `LOADED_HIGH`: the protected-mode part belongs at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// What a vmlinux without a header takes as its command line.
const CMDLINE_BYTES_DEFAULT: u64 = 2048;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// A kernel in guest memory.
#[derive(Clone, Copy)]
pub struct Loaded {
    /// Where the boot vCPU starts, in 64-bit mode.
    pub entry: Gpa,
    /// First byte above everything the kernel occupies before it manages memory itself.
    pub end: u64,
    /// The header that goes into the zero page.
    pub(super) header: setup_header,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded")
            .field("entry", &self.entry)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl Loaded {
    /// Longest command line the kernel reads, with its terminating zero.
    pub(super) fn cmdline_bytes_max(&self) -> u64 {
        u64::from(self.header.cmdline_size) + 1
    }
}

/// Loads the kernel image.
pub fn load(memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
    if magic_at(file, 0)? == Some(ELF_MAGIC) {
        load_elf(memory, file)
    } else if magic_at(file, BZIMAGE_MAGIC_AT)? == Some(BZIMAGE_MAGIC) {
        load_bzimage(memory, file)
    } else {
        Err(BootError::UnknownImage)
    }
}

fn magic_at(file: &File, offset: u64) -> Result<Option<[u8; 4]>, BootError> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, offset) {
        Ok(()) => Ok(Some(magic)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(source) => Err(BootError::Read { what: "kernel", source }),
    }
}

fn bad_image(error: impl std::fmt::Display) -> BootError {
    BootError::BadImage { reason: error.to_string() }
}

fn load_elf(memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
    let high = Some(GuestAddress(layout::HIGH_RAM.raw()));
    let result = Elf::load(memory, None, file, high).map_err(bad_image)?;
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: KERNEL_ALIGNMENT,
        cmdline_size: u32::try_from(CMDLINE_BYTES_DEFAULT - 1).unwrap_or(0),
        ..Default::default()
    };
    let entry = Gpa::new(result.kernel_load.0);
    if !memory.address_in_range(result.kernel_load) {
        return Err(bad_image("the entry point is outside guest memory"));
    }
    Ok(Loaded { entry, end: result.kernel_end, header })
}

fn load_bzimage(memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
    file.seek(SeekFrom::Start(0)).map_err(|source| BootError::Read { what: "kernel", source })?;
    let start = GuestAddress(layout::HIGH_RAM.raw());
    let result = BzImage::load(memory, Some(start), file, Some(start)).map_err(bad_image)?;
    let header = result.setup_header.ok_or(BootError::UnknownImage)?;
    if header.version < PROTOCOL_MIN || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry);
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(bad_image("it does not load at 1 MiB"));
    }
    check_whole(file, &header)?;
    // The kernel unpacks itself from its load address or its preferred one, whichever is higher.
    let unpacked_from = header.pref_address.max(start.0);
    let end = unpacked_from
        .checked_add(u64::from(header.init_size))
        .ok_or_else(|| bad_image("its preferred address is absurd"))?
        .max(result.kernel_end);
    check_fits(memory, end)?;
    Ok(Loaded { entry: Gpa::new(start.0 + ENTRY_64_OFFSET), end, header })
}

/// The loader takes a file cut short for a shorter kernel; the header knows better.
fn check_whole(file: &File, header: &setup_header) -> Result<(), BootError> {
    const SECTOR_BYTES: u64 = 512;
    const PARAGRAPH_BYTES: u64 = 16;
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let need = (setup_sectors + 1) * SECTOR_BYTES + u64::from(header.syssize) * PARAGRAPH_BYTES;
    let read_failed = |source| BootError::Read { what: "kernel", source };
    let have = file.metadata().map_err(read_failed)?.len();
    if have >= need { Ok(()) } else { Err(bad_image("it is cut short")) }
}

/// Bytes of guest memory below the hole.
fn low_bytes(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

fn check_fits(memory: &GuestMemory, need: u64) -> Result<(), BootError> {
    let have = low_bytes(memory);
    if need <= have { Ok(()) } else { Err(BootError::DoesNotFit { need, have }) }
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Initramfs {
    /// Its first byte, below 4 GiB.
    pub start: u32,
    /// Its length.
    pub bytes: u32,
}

/// Loads the initramfs at the top of low memory, out of the way of the kernel.
pub fn load_initramfs(
    memory: &GuestMemory,
    mut file: File,
    kernel: &Loaded,
) -> Result<Initramfs, BootError> {
    let read_failed = |source| BootError::Read { what: "initramfs", source };
    let bytes = file.seek(SeekFrom::End(0)).map_err(read_failed)?;
    file.seek(SeekFrom::Start(0)).map_err(read_failed)?;
    // What is read at its preferred place has a limit of its own; 0 in a vmlinux means none.
    let address_max = u64::from(kernel.header.initrd_addr_max);
    let top = low_bytes(memory).min(if address_max == 0 { u64::MAX } else { address_max + 1 });
    let does_not_fit =
        || BootError::DoesNotFit { need: kernel.end.saturating_add(bytes), have: top };
    let start = top.checked_sub(bytes).ok_or_else(does_not_fit)? & !(PAGE_BYTES - 1);
    if start < kernel.end {
        return Err(does_not_fit());
    }
    let length = usize::try_from(bytes).map_err(|_| does_not_fit())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, length)
        .map_err(|source| BootError::Write { what: "initramfs", source })?;
    let narrow = |value: u64| u32::try_from(value).map_err(|_| does_not_fit());
    Ok(Initramfs { start: narrow(start)?, bytes: narrow(bytes)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use mica_units::Mebibytes;
    use std::io::Write;

    const PAYLOAD: [u8; 64] = [0xf4; 64];

    /// An ELF file of one segment at 1 MiB.
    fn elf() -> Vec<u8> {
        let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        for word in [layout::HIGH_RAM.raw(), 64, 0] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 1, 64, 0, 0] {
            image.extend_from_slice(&half.to_le_bytes());
        }
        image.extend_from_slice(&[1, 0, 0, 0, 7, 0, 0, 0]);
        let length = PAYLOAD.len() as u64;
        for word in [120, layout::HIGH_RAM.raw(), layout::HIGH_RAM.raw(), length, length, 0x1000] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(&PAYLOAD);
        image
    }

    /// A bzImage with one setup sector and [`PAYLOAD`] as its kernel.
    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 1024];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x1f1, &[1]);
        put(0x1f4, &4u32.to_le_bytes());
        put(0x202, b"HdrS");
        put(0x206, &0x20fu16.to_le_bytes());
        put(0x211, &[LOADED_HIGH]);
        put(0x214, &0x10_0000u32.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x238, &255u32.to_le_bytes());
        put(0x258, &0x10_0000u64.to_le_bytes());
        put(0x260, &0x1_0000u32.to_le_bytes());
        image.extend_from_slice(&PAYLOAD);
        image
    }

    fn load_bytes(memory: &GuestMemory, bytes: &[u8]) -> Result<Loaded, BootError> {
        let fd = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        load(memory, &mut file)
    }

    #[test]
    fn both_kinds_load_where_they_say() {
        let memory = Memory::reserve(Mebibytes::new(4)).unwrap().guest().clone();
        let kernel = load_bytes(&memory, &elf()).unwrap();
        assert_eq!(kernel.entry, layout::HIGH_RAM);
        let kernel = load_bytes(&memory, &bzimage()).unwrap();
        assert_eq!(kernel.entry.raw(), 0x10_0200);
        assert_eq!(kernel.end, 0x11_0000);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0xf4);
    }

    #[test]
    fn no_truncation_and_no_changed_byte_panics() {
        let memory = Memory::reserve(Mebibytes::new(4)).unwrap().guest().clone();
        for (image, header) in [(elf(), 0..120), (bzimage(), 0x1f0..0x270)] {
            for length in 0..image.len() {
                assert!(load_bytes(&memory, &image[..length]).is_err(), "{length} bytes");
            }
            let mut refused = 0;
            for at in header {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut changed = image.clone();
                    changed[at] = value;
                    refused += u32::from(load_bytes(&memory, &changed).is_err());
                }
            }
            assert!(refused > 20, "only {refused} changes were noticed");
        }
    }

    #[test]
    fn a_kernel_or_an_initramfs_that_does_not_fit_is_refused() {
        let memory = Memory::reserve(Mebibytes::new(2)).unwrap().guest().clone();
        let mut large = bzimage();
        large[0x260..0x264].copy_from_slice(&0x10_0001u32.to_le_bytes());
        assert!(matches!(load_bytes(&memory, &large), Err(BootError::DoesNotFit { .. })));
        let kernel = load_bytes(&memory, &bzimage()).unwrap();
        let initramfs = |bytes: u64| {
            let fd = rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC);
            let file = File::from(fd.unwrap());
            file.set_len(bytes).unwrap();
            load_initramfs(&memory, file, &kernel)
        };
        assert_eq!(initramfs(4097).unwrap().start, 0x1f_e000);
        assert!(matches!(initramfs(1 << 20), Err(BootError::DoesNotFit { .. })));
    }
}
