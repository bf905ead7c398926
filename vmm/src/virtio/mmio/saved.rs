//! Saving a device as the guest sees it, and taking it back.
//!
//! Called by `freeze` and `restore`, when neither vCPUs nor the device thread run. What is saved is
//! believed no more than a guest is: it is brought in the way a driver would bring it in, register by
//! register. Refuses a state that no driver can have brought the device into.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::{MmioDevice, State, status};
use crate::state::{QueueState, TransportState, Unfit};
use crate::virtio::queue::QueueSetup;
use crate::virtio::{DeviceError, DeviceKind, GuestRam, VirtQueue};

impl MmioDevice {
    /// Everything the guest could find out about the device. Called when it is drained and no vCPU
    /// runs.
    #[must_use]
    pub fn save(&self) -> TransportState {
        self.lock().save(self.kind, self.interrupt.status())
    }

    /// Takes on a saved state. Called when neither vCPUs nor the device thread run.
    ///
    /// # Errors
    /// When it is another device's state, or one that no driver can have brought this device into.
    pub fn restore(&self, state: &TransportState) -> Result<(), Unfit> {
        self.lock().restore(self.kind, state, &self.memory)?;
        self.interrupt.restore(state.interrupt);
        Ok(())
    }

    /// Makes up for what a restore cannot carry over: kicks of the driver and edges of the interrupt
    /// that were on their way. Called after [`MmioDevice::restore`], when the interrupt chips are
    /// restored too.
    ///
    /// # Errors
    /// [`DeviceError::Host`] when an event could not be signalled.
    pub fn catch_up(&self) -> Result<(), DeviceError> {
        for event in &self.queue_events {
            event.signal().map_err(self.host("signal a queue event"))?;
        }
        self.interrupt.raise_again().map_err(self.host("signal an interrupt"))
    }
}

impl State {
    fn save(&self, kind: DeviceKind, interrupt: u32) -> TransportState {
        let queue = |(queue, setup): (&VirtQueue, &QueueSetup)| {
            let (next_available, next_used) = queue.position();
            QueueState {
                ready: queue.is_ready(),
                size: setup.size,
                descriptors: setup.descriptors,
                driver: setup.driver,
                device: setup.device,
                next_available,
                next_used,
            }
        };
        TransportState {
            kind: kind as u32,
            status: self.status,
            interrupt,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: self.queues.iter().zip(&self.setups).map(queue).collect(),
            own: self.device.save(),
        }
    }

    fn restore(
        &mut self,
        kind: DeviceKind,
        saved: &TransportState,
        memory: &GuestRam,
    ) -> Result<(), Unfit> {
        if saved.kind != kind as u32 || saved.queues.len() != self.queues.len() {
            return Err(Unfit("the devices are not the ones that were saved"));
        }
        if saved.status & !(status::KNOWN | status::NEEDS_RESET) != 0 {
            return Err(Unfit("a device status has bits that do not exist"));
        }
        self.reset();
        // First the device: what it offers may depend on what was saved.
        self.device.restore(&saved.own)?;
        self.status = saved.status;
        self.device_features_sel = saved.device_features_sel;
        self.driver_features_sel = saved.driver_features_sel;
        self.driver_features = saved.driver_features;
        self.queue_sel = saved.queue_sel;
        if self.status & status::FEATURES_OK != 0 && !self.features_are_good() {
            return Err(Unfit("a driver accepted features that its device does not offer"));
        }
        let event_index = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for ((queue, setup), saved) in
            self.queues.iter_mut().zip(&mut self.setups).zip(&saved.queues)
        {
            *setup = QueueSetup {
                size: saved.size,
                descriptors: saved.descriptors,
                driver: saved.driver,
                device: saved.device,
                event_index,
            };
            if saved.ready {
                queue
                    .set_up(setup, memory)
                    .map_err(|_| Unfit("a queue is out of form, or outside guest memory"))?;
                queue.go_on_from((saved.next_available, saved.next_used));
            }
        }
        if self.is_between(status::DRIVER_OK, status::FAILED) {
            self.device.activate(self.driver_features);
        }
        Ok(())
    }
}
