//! ACPI tables: how a stock kernel finds its processors and devices without a firmware.
//!
//! Called by `boot`. Hardware-reduced ACPI: no PIT, no PIC, no ACPI timer, no SCI. Processors are in
//! the MADT, virtio-mmio devices and the serial port in the DSDT. The reset register is the keyboard
//! controller's port, so that every way a kernel knows to reset ends at the same place.
//!
//! The DSDT also has the generation id (Microsoft's "Virtual Machine Generation ID", 2012): a kernel
//! that finds a new one knows that it is a copy, and seeds its random numbers again. It looks when
//! the Generic Event Device (ACPI 6.4, 5.6.9) has an interrupt.

use acpi_tables::aml::{
    self, AmlStr, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use mica_units::{Gpa, VcpuCount};

use super::BootError;
use crate::layout;
use crate::memory::GuestMemory;

const OEM: [u8; 6] = *b"MICA  ";
const OEM_TABLE: [u8; 8] = *b"MICAVM  ";
const REVISION: u32 = 1;
/// Bytes of the header that every table starts with.
const HEADER_BYTES: u32 = 36;
const GENERATION_DEVICE: &str = "VGEN";
const TABLE_ALIGN: usize = 64;
/// Boot architecture flags: no VGA, no CMOS clock. No bit says "keyboard controller", so absent.
const NO_VGA_NO_CMOS: u16 = (1 << 2) | (1 << 5);

/// Writes all tables, the RSDP first.
pub fn write(memory: &GuestMemory, vcpus: VcpuCount, devices: usize) -> Result<(), BootError> {
    let bytes = tables(layout::ACPI, vcpus, devices);
    super::write(memory, "ACPI tables", layout::ACPI, &bytes)
}

/// All tables as they lie from `base` on.
fn tables(base: Gpa, vcpus: VcpuCount, devices: usize) -> Vec<u8> {
    let mut image = vec![0; Rsdp::len()];
    let mut place = |table: &dyn Aml| {
        image.resize(image.len().next_multiple_of(TABLE_ALIGN), 0);
        let at = base.raw() + image.len() as u64;
        table.to_aml_bytes(&mut Sink(&mut image));
        at
    };
    let dsdt = place(&dsdt(devices));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut Sink(&mut rsdp));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    image
}

struct Sink<'a>(&'a mut Vec<u8>);

impl AmlSink for Sink<'_> {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |address: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed power and sleep buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_PORT + 1);
    fadt.finalize()
}

fn madt(vcpus: VcpuCount) -> MADT {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, address);
    for index in 0..vcpus.get() {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(devices: usize) -> Sdt {
    let serial = serial_device();
    let devices: Vec<Raw> = (0u8..).take(devices).map(virtio_device).collect();
    let mut children: Vec<&dyn Aml> = vec![&serial];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    let (generation, events) = (generation_device(), event_device());
    children.extend([&generation as &dyn Aml, &events]);
    let mut aml = Vec::new();
    Scope::new(Path::new("_SB_"), children).to_aml_bytes(&mut Sink(&mut aml));
    let s5 = Package::new(vec![&layout::SLEEP_TYPE_S5]);
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut Sink(&mut aml));
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

/// AML that is already bytes.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn edge_interrupt(gsi: u32) -> Interrupt {
    // Consumer, edge triggered, active high, not shared: what an irqfd without resampling gives.
    Interrupt::new(true, true, false, false, gsi)
}

fn serial_device() -> Raw {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let interrupt = edge_interrupt(layout::SERIAL_GSI);
    let mut aml = Vec::new();
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    )
    .to_aml_bytes(&mut Sink(&mut aml));
    Raw(aml)
}

fn virtio_device(index: u8) -> Raw {
    // Constants of `layout` keep every device below 4 GiB and every line below 24.
    let base = layout::MMIO_DEVICES.raw() + u64::from(index) * layout::MMIO_DEVICE_BYTES;
    let base = u32::try_from(base).unwrap_or(0);
    let length = u32::try_from(layout::MMIO_DEVICE_BYTES).unwrap_or(0);
    let registers = Memory32Fixed::new(true, base, length);
    let interrupt = edge_interrupt(layout::FIRST_DEVICE_GSI + u32::from(index));
    let hid: AmlStr = "LNRO0005";
    let mut aml = Vec::new();
    Device::new(
        Path::new(&format!("VR{index:02}")),
        vec![
            &Name::new(Path::new("_HID"), &hid),
            &Name::new(Path::new("_UID"), &index),
            &Name::new(Path::new("_CCA"), &aml::ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    )
    .to_aml_bytes(&mut Sink(&mut aml));
    Raw(aml)
}

fn generation_device() -> Raw {
    // The hardware id under which every kernel that has the driver has tried it; the specification
    // leaves it open and asks for the other two names.
    let (hid, name): (AmlStr, AmlStr) = ("QEMUVGID", "VM_Gen_Counter");
    // Low and high half. A constant of `layout` below 1 MiB.
    let address = u32::try_from(layout::GENERATION_ID.raw()).unwrap_or(0);
    let mut aml = Vec::new();
    Device::new(
        Path::new(GENERATION_DEVICE),
        vec![
            &Name::new(Path::new("_HID"), &hid),
            &Name::new(Path::new("_CID"), &name),
            &Name::new(Path::new("_DDN"), &name),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&address, &aml::ZERO])),
        ],
    )
    .to_aml_bytes(&mut Sink(&mut aml));
    Raw(aml)
}

/// The Generic Event Device: its one interrupt means that the generation id changed.
fn event_device() -> Raw {
    // "Device specific": the value that the generation id's specification names.
    const CHANGED: u8 = 0x80;
    let hid: AmlStr = "ACPI0013";
    let interrupt = edge_interrupt(layout::GENERATION_GSI);
    let device = Path::new(GENERATION_DEVICE);
    let notify = Notify::new(&device, &CHANGED);
    let is_ours = Equal::new(&Arg(0), &layout::GENERATION_GSI);
    let mut aml = Vec::new();
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &hid),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(Path::new("_EVT"), 1, true, vec![&If::new(&is_ours, vec![&notify])]),
        ],
    )
    .to_aml_bytes(&mut Sink(&mut aml));
    Raw(aml)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(image: &[u8], at: usize) -> usize {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize
    }

    fn u64_at(image: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        for vcpus in [1, 8] {
            let image =
                tables(layout::ACPI, VcpuCount::new(vcpus).unwrap(), layout::MMIO_DEVICES_MAX);
            assert!((image.len() as u64) < layout::ACPI_BYTES_MAX);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            let offset = |address: u64| usize::try_from(address - layout::ACPI.raw()).unwrap();
            let table = |address: u64| {
                let at = offset(address);
                let table = &image[at..at + u32_at(&image, at + 4)];
                assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(&table[..4]));
                table
            };
            assert_eq!(&image[..8], b"RSD PTR ");
            assert_eq!(sum(&image[..20]), 0);
            assert_eq!(sum(&image[..36]), 0);
            let xsdt = table(u64_at(&image, 24));
            let entries: Vec<_> =
                xsdt[36..].chunks(8).map(|entry| table(u64_at(entry, 0))).collect();
            assert_eq!(&entries[0][..4], b"FACP");
            assert_eq!(&entries[1][..4], b"APIC");
            assert_eq!(entries[1].len(), 44 + 8 * vcpus as usize + 12);
            let dsdt = table(u64_at(entries[0], 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            let names = dsdt.windows(8).filter(|window| *window == b"LNRO0005").count();
            assert_eq!(names, layout::MMIO_DEVICES_MAX);
        }
    }

    /// Checked by hand once: `iasl -d` (acpica-tools 20200925) prints the two devices as meant, and
    /// Debian's 6.12 cloud kernel, given them as an SSDT under QEMU, binds both of its drivers.
    #[test]
    fn the_generation_id_and_its_event_are_these_bytes() {
        let mut expected = b"\x5b\x82\x4d\x04VGEN".to_vec();
        expected.extend_from_slice(b"\x08_HID\x0dQEMUVGID\0");
        expected.extend_from_slice(b"\x08_CID\x0dVM_Gen_Counter\0");
        expected.extend_from_slice(b"\x08_DDN\x0dVM_Gen_Counter\0");
        expected.extend_from_slice(b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0e\x00\x00");
        assert_eq!(generation_device().0, expected);

        let mut expected = b"\x5b\x82\x43\x04GED_".to_vec();
        expected.extend_from_slice(b"\x08_HID\x0dACPI0013\0");
        expected.extend_from_slice(b"\x08_UID\x00");
        // A buffer of 11 bytes: one extended interrupt, consumer and edge, number 16; the end.
        expected.extend_from_slice(b"\x08_CRS\x11\x0e\x0a\x0b");
        expected.extend_from_slice(b"\x89\x06\x00\x03\x01\x10\x00\x00\x00\x79\x00");
        // A serialized method of one argument: if it is 16, notify the device with 0x80.
        expected.extend_from_slice(b"\x14\x13_EVT\x09");
        expected.extend_from_slice(b"\xa0\x0c\x93\x68\x0a\x10\x86VGEN\x0a\x80");
        assert_eq!(event_device().0, expected);
    }
}
