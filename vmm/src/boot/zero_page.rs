//! The zero page: what the boot loader tells a Linux kernel (`struct boot_params`).
//!
//! Called by `boot`, last. Lists memory with the boot structures taken out, so that the kernel does
//! not overwrite the ACPI tables before it has read them.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address, ByteValued, GuestMemoryBackend, GuestMemoryRegion};

use super::kernel::{Initramfs, Loaded};
use super::{BootError, write as write_bytes};
use crate::layout;
use crate::memory::GuestMemory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page.
pub fn write(
    memory: &GuestMemory,
    kernel: &Loaded,
    initramfs: Option<Initramfs>,
    cmdline_bytes: u32,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low_u32(layout::CMDLINE.raw());
    params.hdr.cmdline_size = cmdline_bytes;
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = initramfs.start;
        params.hdr.ramdisk_size = initramfs.bytes;
    }
    params.acpi_rsdp_addr = layout::ACPI.raw();
    let entries = memory_map(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&entries) {
        *slot = *entry;
    }
    params.e820_entries = u8::try_from(entries.len()).unwrap_or(u8::MAX);
    write_bytes(memory, "zero page", layout::ZERO_PAGE, params.as_slice())
}

/// The constants of `layout` that go into 32-bit fields lie below 4 GiB.
fn low_u32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry { addr, size: end - addr, r#type: kind };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END.raw(), E820_RAM),
        entry(layout::ACPI.raw(), layout::ACPI.raw() + layout::ACPI_BYTES_MAX, E820_ACPI),
        // The generation id and the BIOS: the id must not lie in memory that a kernel may reclaim.
        entry(layout::GENERATION_ID.raw(), layout::HIGH_RAM.raw(), E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start + region.len();
        map.push(entry(start.max(layout::HIGH_RAM.raw()), end, E820_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use mica_units::Mebibytes;

    #[test]
    fn the_map_covers_memory_and_overlaps_nowhere() {
        for mebibytes in [2, 512, 3072, 8192] {
            let memory = Memory::reserve(Mebibytes::new(mebibytes)).unwrap().guest().clone();
            let map = memory_map(&memory);
            let mut last_end = 0;
            for entry in &map {
                let (addr, size) = (entry.addr, entry.size);
                assert!(addr >= last_end && size > 0, "{addr:#x}+{size:#x}");
                last_end = addr + size;
            }
            assert_eq!(last_end - 1, memory.last_addr().raw_value());
        }
    }
}
