//! What a guest reaches outside its memory: ports and device registers, and who answers.
//!
//! Called by the vCPU threads through [`Exits`]. Every address and byte is the guest's. Nothing
//! answers at an unknown address: reads give all ones, writes go nowhere, and neither is logged.

use std::sync::Arc;

use mica_wire::vm::Ending;

use crate::console::Console;
use crate::kvm::Exits;
use crate::layout;
use crate::virtio::{DeviceError, MMIO_BYTES, MmioDevice};

const _: () = assert!(MMIO_BYTES <= layout::MMIO_DEVICE_BYTES);

/// All devices of one VM, as its vCPUs see them.
#[derive(Debug)]
pub struct Bus {
    console: Console,
    devices: Vec<Arc<MmioDevice>>,
}

impl Bus {
    /// The serial port, and the virtio devices in the order of the DSDT.
    #[must_use]
    pub fn new(console: Console, devices: Vec<Arc<MmioDevice>>) -> Self {
        Self { console, devices }
    }

    /// The serial port.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The virtio devices, in the order of the DSDT.
    #[must_use]
    pub fn devices(&self) -> &[Arc<MmioDevice>] {
        &self.devices
    }

    /// The device at this address, and the offset into its registers.
    fn device_at(&self, address: u64) -> Option<(&MmioDevice, u64)> {
        let offset = address.checked_sub(layout::MMIO_DEVICES.raw())?;
        let index = usize::try_from(offset / layout::MMIO_DEVICE_BYTES).ok()?;
        Some((self.devices.get(index)?, offset % layout::MMIO_DEVICE_BYTES))
    }
}

/// The register of the serial port behind this port.
fn serial_register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(layout::SERIAL_PORT)?;
    u8::try_from(offset).ok().filter(|offset| u16::from(*offset) < layout::SERIAL_PORTS)
}

impl Exits for Bus {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = serial_register(port) {
            // A repeated read gives one byte each time; a wide one is nothing a driver does.
            for byte in data {
                *byte = self.console.read(register);
            }
            return;
        }
        // The keyboard controller is never busy and holds no key; no sleep state was ever entered.
        let answers_zero = [layout::RESET_PORT, layout::SLEEP_PORT, layout::SLEEP_PORT + 1];
        data.fill(if answers_zero.contains(&port) { 0 } else { 0xff });
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Result<(), Ending> {
        if let Some(register) = serial_register(port) {
            return data
                .iter()
                .try_for_each(|byte| self.console.write(register, *byte))
                .map_err(|error| Ending::Internal(error.to_string()));
        }
        match (port, data) {
            (layout::RESET_PORT, [layout::RESET_VALUE, ..])
            | (layout::SLEEP_PORT, [layout::SLEEP_VALUE_S5, ..]) => Err(Ending::Reset),
            _ => Ok(()),
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) -> Result<(), Ending> {
        if let Some((device, offset)) = self.device_at(address) {
            device.read(offset, data);
        }
        Ok(())
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), Ending> {
        match self.device_at(address) {
            Some((device, offset)) => {
                device.write(offset, data).map_err(|error| device_ending(&error))
            }
            None => Ok(()),
        }
    }
}

/// The ending that a failed device means.
#[must_use]
pub fn device_ending(error: &DeviceError) -> Ending {
    match error {
        DeviceError::Guest(fault) => Ending::GuestFault(fault.to_string()),
        DeviceError::Host { source, .. } => Ending::Internal(format!("{error}: {source}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_registers_are_eight_ports() {
        assert_eq!(serial_register(0x3f7), None);
        assert_eq!(serial_register(0x3f8), Some(0));
        assert_eq!(serial_register(0x3ff), Some(7));
        assert_eq!(serial_register(0x400), None);
        assert_eq!(serial_register(0xffff), None);
    }
}
