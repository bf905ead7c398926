//! How a driver hands a VM process what its guest goes on from.
//!
//! Called by the driver when the state machine says so: a plan and a state, all of them or what differs,
//! or a kernel. Refuses to wait for anything but room in the control socket.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;

use mica_storage::{BootFiles, Layer, Piece};
use mica_units::{FrameRun, PAGE_BYTES};
use mica_wire::vm::{BootConfig, Command, FdRole, RestoreConfig};

use super::super::state::Event;
use super::super::{chain, link, paging};
use super::{Driver, Opened};
use crate::metrics::Phase;
use crate::random::random;
use crate::shell::Held;

impl Driver {
    pub(super) async fn send_restore(&mut self) {
        let sent = match self.back.take() {
            Some(back) => {
                let image = Arc::clone(&back.image);
                let ended = self.end_paging();
                self.memory.went_back(&back.entries, &image.layers);
                self.image = Some(Arc::clone(&image));
                match ended {
                    Ok(()) => self.restore(&image, &back.plan, false).await,
                    Err(error) => Err(format!("its memory on demand: {error}")),
                }
            }
            None => match (self.boot.take(), self.image.clone()) {
                (Some(files), _) => self.send_boot(files).await,
                (None, Some(image)) => self.restore_image(&image).await,
                (None, None) => Err("there is nothing to restore".to_owned()),
            },
        };
        self.watch.lap(Phase::State);
        // While the VM process restores: what only the next daemon needs. Of what boots for the first time
        // that daemon could not tell how far it is, and it takes long: it is written down when it is up.
        if !self.boots || self.paused_in.is_some() {
            self.settle();
        }
        if let Err(error) = sent {
            tracing::warn!(id = %self.sandbox.id, error, "a restore was not sent");
            self.caused.push_back(Event::VmLost("its state could not be handed over"));
        }
    }

    /// Restores all of an image: mapped, or on demand where it is too large for that.
    async fn restore_image(&mut self, image: &Arc<Opened>) -> Result<(), String> {
        let held = self.held().ok_or("it has no process")?;
        let on_demand = self.shard.workshop.config.is_on_demand(image.file_bytes());
        if !on_demand || held.layout.userfault_fd.is_none() {
            return self.restore(image, &image.plan, true).await;
        }
        self.page(&held, &image.layers, &image.pieces, image.working_set.clone())?;
        self.restore(image, &[], true).await
    }

    /// A rollback maps what the guest does not have, so nothing is brought in any more. Before the VM
    /// process maps: a range can only be given up while all of it is anonymous.
    fn end_paging(&mut self) -> std::io::Result<()> {
        match (self.paging.take(), self.held()) {
            (Some(_), Some(held)) => paging::end(&held, self.frames()),
            _ => Ok(()),
        }
    }

    /// Begins to bring pages in when they are touched.
    pub(super) fn page(
        &mut self,
        held: &Held,
        layers: &[Layer],
        pieces: &[Piece],
        first: Option<Vec<FrameRun>>,
    ) -> Result<(), String> {
        let sandbox = Rc::clone(&self.sandbox);
        let failed = move || sandbox.lose("its memory cannot be read any more");
        let (ring, first) = (&self.shard.ring, first.unwrap_or_default());
        let paging = paging::begin(held, ring, self.frames(), layers, pieces, first, failed);
        self.paging = Some(paging.map_err(|error| format!("its memory on demand: {error}"))?);
        // Pages come protected, so that what is written shows from the start; nothing is mapped.
        self.memory.tracked = paging::tells_writes(held);
        self.memory.on_demand = true;
        self.memory.mapped = None;
        Ok(())
    }

    async fn restore(
        &mut self,
        image: &Opened,
        plan: &[u8],
        with_disk: bool,
    ) -> Result<(), String> {
        let held = self.held().ok_or("it has no process")?;
        let state = &image.manifest.state;
        let at = (plan.len() as u64).next_multiple_of(PAGE_BYTES);
        write_exchange(&held, plan, 0).and_then(|()| write_exchange(&held, state, at))?;
        let mut generation = [0; 16];
        random(&mut generation).map_err(|error| error.to_string())?;
        let mut fds = Vec::new();
        let mut roles = Vec::new();
        if let Some(disk) = self.disk.as_ref().filter(|_| with_disk) {
            roles.push(FdRole::Disk);
            fds.push(disk.as_fd());
        }
        fds.extend(image.layer_fds());
        roles.resize(fds.len(), FdRole::Layer);
        let config = RestoreConfig {
            plan_bytes: plan.len() as u64,
            state_bytes: state.len() as u64,
            generation,
            fds: roles,
        };
        let sent = link::send(&held.control, &Command::Restore(config), &fds).await;
        sent.map_err(|error| chain(&error))
    }

    /// Boots a kernel on its disk, in memory that is empty.
    async fn send_boot(&mut self, files: BootFiles) -> Result<(), String> {
        let held = self.held().ok_or("it has no process")?;
        let BootFiles { kernel, initramfs, cmdline } = files;
        let (mut roles, mut fds) = (vec![FdRole::Kernel], vec![kernel.as_fd()]);
        if let Some(initramfs) = &initramfs {
            roles.push(FdRole::Initramfs);
            fds.push(initramfs.as_fd());
        }
        let disk = self.disk.clone().ok_or("its disk is not there")?;
        roles.push(FdRole::Disk);
        fds.push(disk.as_fd());
        // It comes up in seconds: the pool does not wait for that.
        self.claim = None;
        let config = BootConfig { cmdline, disk_read_only: false, fds: roles };
        let sent = link::send(&held.control, &Command::Boot(config), &fds).await;
        sent.map_err(|error| chain(&error))
    }
}

/// A memfd takes what is written to it, whole, unless memory is out.
fn write_exchange(held: &Held, bytes: &[u8], at: u64) -> Result<(), String> {
    let mut done = 0;
    while done < bytes.len() {
        let wrote = rustix::io::pwrite(&held.exchange, &bytes[done..], at + done as u64);
        match wrote.map_err(|errno| format!("the exchange: {errno}"))? {
            0 => return Err("the exchange takes no more".to_owned()),
            more => done += more,
        }
    }
    Ok(())
}
