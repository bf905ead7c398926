//! Where everything lies in guest-physical space and on the guest's ports.
//!
//! Read by `boot`, `kvm`, `memory` and `build`; the only place such numbers are written. Refuses to
//! hold anything that depends on a configuration, except how memory is cut around the hole.
//!
//! ```text
//!  0x500      GDT, IDT                      0xe0000   ACPI tables
//!  0x7000     zero page                     0xef000   generation id
//!  0x9000     page tables (6 pages)         0x100000  kernel, then initramfs at the top
//!  0x20000    command line                  0xc0000000 .. 4 GiB  the hole: devices, APICs
//!                                           4 GiB     the rest of memory
//! ```

use mica_units::{Gpa, Mebibytes, PAGE_BYTES};

/// The boot GDT.
pub const GDT: Gpa = Gpa::new(0x500);
/// An IDT of one null entry.
pub const IDT: Gpa = Gpa::new(0x540);
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: Gpa = Gpa::new(0x7000);
/// First stack of a guest that needs one before it sets its own.
pub const BOOT_STACK: Gpa = Gpa::new(0x8ff0);
/// PML4, PDPT and four page directories: an identity map of the first 4 GiB.
pub const PAGE_TABLES: Gpa = Gpa::new(0x9000);
/// Pages of [`PAGE_TABLES`].
pub const PAGE_TABLE_PAGES: u64 = 6;
/// The kernel command line.
pub const CMDLINE: Gpa = Gpa::new(0x2_0000);
/// Room for the command line with its terminating zero.
pub const CMDLINE_BYTES_MAX: u64 = 0x1_0000;
/// End of usable conventional memory.
pub const LOW_RAM_END: Gpa = Gpa::new(0x9_fc00);
/// ACPI tables, the RSDP first: a BIOS-less kernel also searches here.
pub const ACPI: Gpa = Gpa::new(0xe_0000);
/// Room for the ACPI tables.
pub const ACPI_BYTES_MAX: u64 = 0xf000;
/// The generation id, 16 bytes: the last page before [`BIOS`], reserved, so that no kernel ever uses
/// it for anything else.
pub const GENERATION_ID: Gpa = Gpa::new(0xe_f000);
/// What stands for a BIOS: reserved, and empty but for [`RESET_VECTOR`].
pub const BIOS: Gpa = Gpa::new(0xf_0000);
/// Where a kernel jumps in real mode when it asks the BIOS for a reset.
pub const RESET_VECTOR: Gpa = Gpa::new(0xf_fff0);
/// Where memory for the kernel begins.
pub const HIGH_RAM: Gpa = Gpa::new(0x10_0000);

/// Start of the hole below 4 GiB.
pub const HOLE: Gpa = Gpa::new(0xc000_0000);
/// End of the hole.
pub const HOLE_END: Gpa = Gpa::new(0x1_0000_0000);
/// First virtio-mmio device.
pub const MMIO_DEVICES: Gpa = Gpa::new(0xd000_0000);
/// Bytes of registers for each device.
pub const MMIO_DEVICE_BYTES: u64 = PAGE_BYTES;
/// Most virtio-mmio devices: one interrupt line each, from [`FIRST_DEVICE_GSI`] on.
pub const MMIO_DEVICES_MAX: usize = 8;
/// I/O APIC, at the address every x86 kernel expects.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs, likewise.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that VT-x without unrestricted guest wants for itself.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt line of the first virtio-mmio device; the n-th has the n-th after it.
pub const FIRST_DEVICE_GSI: u32 = 5;
/// Interrupt line of the Generic Event Device, which says that the generation id is a new one. Above
/// the lines that the ISA bus gives a meaning.
pub const GENERATION_GSI: u32 = 16;

/// First port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of the serial port.
pub const SERIAL_PORTS: u16 = 8;
/// The keyboard controller's command port, whose one command here is reset. Also the ACPI reset
/// register.
pub const RESET_PORT: u16 = 0x64;
/// What a guest writes to [`RESET_PORT`] to reset the machine.
pub const RESET_VALUE: u8 = 0xfe;
/// The ACPI sleep control register; the sleep status register is the port after it.
pub const SLEEP_PORT: u16 = 0x600;
/// The sleep type of S5 in the DSDT.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What a guest writes to [`SLEEP_PORT`] to power off: sleep enable, and the type in bits 2 to 4.
pub const SLEEP_VALUE_S5: u8 = (1 << 5) | (SLEEP_TYPE_S5 << 2);

/// The smallest guest: the fixed structures below 1 MiB and as much again.
pub const MEMORY_MIN: Mebibytes = Mebibytes::new(2);

/// One piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub start: Gpa,
    /// Its length.
    pub bytes: u64,
}

/// Cuts memory of this size around the hole: one span, or two.
#[must_use]
pub fn memory_spans(memory: Mebibytes) -> Vec<Span> {
    let total = memory.to_bytes();
    let low = total.min(HOLE.raw());
    let mut spans = vec![Span { start: Gpa::new(0), bytes: low }];
    if total > low {
        spans.push(Span { start: HOLE_END, bytes: total - low });
    }
    spans
}

const _: () = assert!(IDT.raw() + 16 <= ZERO_PAGE.raw());
const _: () = assert!(ZERO_PAGE.raw() + PAGE_BYTES <= PAGE_TABLES.raw());
const _: () = assert!(PAGE_TABLES.raw() + PAGE_TABLE_PAGES * PAGE_BYTES <= CMDLINE.raw());
const _: () = assert!(CMDLINE.raw() + CMDLINE_BYTES_MAX <= LOW_RAM_END.raw());
const _: () = assert!(ACPI.raw() + ACPI_BYTES_MAX <= GENERATION_ID.raw());
const _: () = assert!(GENERATION_ID.raw() + PAGE_BYTES <= BIOS.raw());
const _: () = assert!(RESET_VECTOR.raw() + 16 == HIGH_RAM.raw());
// The I/O APIC has 24 lines; no two sources share one.
const _: () = assert!(SERIAL_GSI < FIRST_DEVICE_GSI);
const _: () = assert!(FIRST_DEVICE_GSI as usize + MMIO_DEVICES_MAX <= GENERATION_GSI as usize);
const _: () = assert!(GENERATION_GSI < 24);
const _: () =
    assert!(MMIO_DEVICES.raw() + MMIO_DEVICES_MAX as u64 * MMIO_DEVICE_BYTES <= IOAPIC as u64);
const _: () = assert!(MEMORY_MIN.to_bytes() > HIGH_RAM.raw());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_cut_around_the_hole_and_none_is_lost() {
        assert_eq!(memory_spans(Mebibytes::new(512)).len(), 1);
        assert_eq!(memory_spans(Mebibytes::new(3072)).len(), 1);
        let spans = memory_spans(Mebibytes::new(3073));
        assert_eq!(spans[0].bytes, HOLE.raw());
        assert_eq!(spans[1], Span { start: HOLE_END, bytes: 1 << 20 });
        for mebibytes in [2, 3071, 3072, 3073, 4096, 500_000] {
            let total: u64 =
                memory_spans(Mebibytes::new(mebibytes)).iter().map(|span| span.bytes).sum();
            assert_eq!(total, u64::from(mebibytes) << 20);
        }
    }
}
