//! The interrupt line of one device: the status register and the irqfd behind it.
//!
//! Called by the device loop (to raise) and by vCPU threads (to read and acknowledge). Refuses to
//! take a lock: a guest's interrupt handler touches both registers on every interrupt.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Event;

/// `InterruptStatus` bit 0: the device used buffers (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration, or the device status, changed.
const CONFIG_CHANGE: u32 = 2;

/// The line. Edge-triggered: one write to the irqfd is one interrupt.
#[derive(Debug)]
pub(super) struct Interrupt {
    status: AtomicU32,
    line: Event,
}

impl Interrupt {
    pub(super) fn new(line: Event) -> Self {
        Self { status: AtomicU32::new(0), line }
    }

    /// Tells the driver that a used ring has news.
    pub(super) fn used_buffer(&self) -> std::io::Result<()> {
        self.raise(USED_BUFFER)
    }

    /// Tells the driver to read the device status again.
    pub(super) fn config_change(&self) -> std::io::Result<()> {
        self.raise(CONFIG_CHANGE)
    }

    // The status comes first: the driver reads it when the interrupt arrives. The ring was written
    // before either, and SeqCst keeps that order.
    fn raise(&self, bit: u32) -> std::io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.signal()
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn reset(&self) {
        self.restore(0);
    }

    /// Takes on a saved status. The line is not touched: see [`Interrupt::raise_again`].
    pub(super) fn restore(&self, status: u32) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
    }

    /// Interrupts again if the driver has not acknowledged everything: an edge may have been on its
    /// way when the state was saved. One too many does no harm, the driver reads the status first.
    pub(super) fn raise_again(&self) -> std::io::Result<()> {
        if self.status() == 0 { Ok(()) } else { self.line.signal() }
    }
}
