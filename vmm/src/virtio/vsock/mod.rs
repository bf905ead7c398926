//! virtio-vsock (virtio 1.2, 5.10), streams only: connections from the host into the guest.
//!
//! Called through the transport, and through a [`Connector`] by the control thread. Refuses every
//! connection that the guest starts; one to the doorbell port is also reported, once.
//!
//! ```text
//!   control thread ──Connector──▶ Table of Connections ◀──epoll── sockets
//!                                    │            ▲
//!                        "has a packet"           │ packets
//!                                    ▼            │
//!      ring 0 to the guest ◀── deliver          take ◀── ring 1 from the guest
//! ```
//! Fairness: connections with something for the guest stand in one line; each gives one control
//! packet or one read of its socket and goes to the end. Nothing is stored for a guest that does not
//! take it: what a connection owes are flags, and resets for strangers are bounded by not taking
//! further packets from the guest while [`RESETS_MAX`] wait.

mod connection;
mod connector;
#[cfg(test)]
mod guest;
mod packet;
mod socket;
#[cfg(test)]
mod stream_tests;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use mica_wire::guest::DOORBELL_PORT;
use rustix::event::{Timespec, epoll};

use crate::state::{DeviceState, PortPair, Unfit, VsockState};

use super::queue::{copy_from_guest, copy_to_guest, total_bytes};
use super::{
    Chain, DeviceError, DeviceKind, GuestFault, GuestRam, Progress, Ready, Rule, VirtQueue,
    VirtioDevice, read_config_bytes,
};
use connection::{BUFFER_BYTES, Connection, Emit};
use connector::Requests;
pub use connector::{ConnectError, Connector};
use packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use socket::Socket;
use table::{CONNECTIONS_MAX, Table};

/// Resets owed to packets of no connection.
const RESETS_MAX: usize = 64;
/// Streams that a guest can hold for open: those there are, and those it is owed a reset for.
const OPEN_MAX: usize = CONNECTIONS_MAX + RESETS_MAX;
/// Packets in each direction in one turn.
const PACKETS_PER_TURN: usize = 128;
/// Receive buffers filled by one read of a socket.
const BUFFERS_PER_READ: usize = 16;
/// Socket events taken in one turn.
const EVENTS_PER_TURN: usize = 64;
/// Most data of one packet in either direction, and of one read of a socket.
const DATA_BYTES_MAX: usize = BUFFER_BYTES as usize;
/// Token of the event behind [`Connector`]; ports start above it.
const REQUESTS: u64 = 0;

/// What the guest rings: called once.
type Doorbell = Box<dyn FnOnce() + Send>;

/// The device.
pub struct Vsock {
    guest_cid: u32,
    doorbell: Option<Doorbell>,
    requests: Requests,
    /// Holds the sockets and the event of `requests`; readable itself when one of them has news.
    epoll: Arc<OwnedFd>,
    table: Table,
    /// Host-side ports of connections with something for the guest, each at most once, and some of
    /// connections that are over.
    line: VecDeque<u32>,
    resets: VecDeque<Header>,
    live: bool,
    chains: [Chain; BUFFERS_PER_READ],
    data: Box<[u8]>,
}

impl Vsock {
    /// A device whose guest has the address `guest_cid`. `doorbell` is called on the device thread
    /// when the guest first connects to `DOORBELL_PORT` of the host; it must not block.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(guest_cid: u32, doorbell: Doorbell) -> std::io::Result<(Self, Connector)> {
        let (requests, connector) = Requests::new()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &requests, epoll::EventData::new_u64(REQUESTS), epoll::EventFlags::IN)?;
        let vsock = Self {
            guest_cid,
            doorbell: Some(doorbell),
            requests,
            epoll: Arc::new(epoll),
            table: Table::default(),
            line: VecDeque::new(),
            resets: VecDeque::new(),
            live: false,
            chains: Default::default(),
            data: vec![0; DATA_BYTES_MAX].into_boxed_slice(),
        };
        Ok((vsock, connector))
    }

    /// Takes new sockets and the events of old ones. Whether there may be more.
    fn take_events(&mut self) -> Result<bool, DeviceError> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS_PER_TURN];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let arrived = match epoll::wait(&*self.epoll, &mut events, Some(&now)) {
            Ok((arrived, _)) => &*arrived,
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(errno) => return Err(host("wait for sockets")(errno.into())),
        };
        for event in arrived {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == REQUESTS {
                self.take_requests()?;
            } else if let Ok(port) = u32::try_from(token) {
                self.touch(port, |connection| connection.on_socket(flags));
            }
        }
        Ok(arrived.len() == EVENTS_PER_TURN)
    }

    fn take_requests(&mut self) -> Result<(), DeviceError> {
        let Self { requests, table, line, epoll, guest_cid, .. } = self;
        let take = |fd, guest_port| {
            // No room, or no memory for epoll: the socket closes, and its other end sees that.
            let Some(port) = table.free_port() else { return };
            // Connections that ended without the guest taking a packet leave their port behind.
            if line.len() >= 2 * CONNECTIONS_MAX {
                line.retain(|port| table.get(*port).is_some());
            }
            let Ok(socket) = Socket::new(fd, epoll, port) else { return };
            let cid = u64::from(*guest_cid);
            let mut connection = Connection::new(socket, cid, guest_port, port);
            connection.queued = true;
            table.insert(port, connection);
            line.push_back(port);
        };
        requests.take_all(take).map_err(host("take connections"))
    }

    /// Changes a connection, and then sees to what that made of it.
    fn touch(&mut self, port: u32, change: impl FnOnce(&mut Connection)) {
        let Some(connection) = self.table.get(port) else { return };
        change(connection);
        if connection.is_over() {
            // Its port may still stand in the line; there it finds nobody.
            self.table.remove(port);
        } else if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.line.push_back(port);
        }
    }

    /// Takes packets from the guest. Whether there may be more that can be taken now.
    fn take_packets(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<bool, DeviceError> {
        queue.disable_kicks(memory)?;
        let mut budget = PACKETS_PER_TURN;
        loop {
            // The guest gets nothing taken before it takes its resets; delivering them resumes this.
            if self.resets.len() >= RESETS_MAX {
                return Ok(false);
            }
            if budget == 0 {
                return Ok(true);
            }
            if !queue.pop(memory, &mut self.chains[0])? {
                if queue.enable_kicks(memory)? {
                    queue.disable_kicks(memory)?;
                    budget -= 1;
                    continue;
                }
                return Ok(false);
            }
            budget -= 1;
            let head = self.chains[0].head();
            self.take_packet(memory).map_err(|_| queue.fault(Rule::BufferOutsideMemory))?;
            queue.push_used(memory, head, 0)?;
        }
    }

    /// Takes the packet in the first chain.
    fn take_packet(&mut self, memory: &GuestRam) -> Result<(), vm_memory::GuestMemoryError> {
        let segments = self.chains[0].readable();
        let mut bytes = [0; HEADER_BYTES];
        // Too short for a header: there is nobody to answer.
        if copy_from_guest(memory, segments, 0, &mut bytes)? < HEADER_BYTES {
            return Ok(());
        }
        let header = Header::decode(&bytes);
        // From or to someone who is not here: dropped, as a network would (5.10.6.4).
        if header.src_cid != u64::from(self.guest_cid) || header.dst_cid != HOST_CID {
            return Ok(());
        }
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        let fits = length <= DATA_BYTES_MAX;
        let data = self.data.get_mut(..length).unwrap_or_default();
        let copied = copy_from_guest(memory, segments, HEADER_BYTES as u64, data)?;
        let in_form = fits && copied == length && header.kind == TYPE_STREAM;

        let port = header.dst_port;
        if !self.table.get(port).is_some_and(|found| found.is_with(header.src_port)) {
            self.answer_stranger(&header);
            return Ok(());
        }
        // Moved out for the call: the connection is part of self too.
        let data = std::mem::take(&mut self.data);
        self.touch(port, |connection| {
            if in_form {
                connection.receive(&header, data.get(..length).unwrap_or_default());
            } else {
                connection.abort();
            }
        });
        self.data = data;
        Ok(())
    }

    /// Answers a packet of no connection: with a reset, and the doorbell where that is rung.
    fn answer_stranger(&mut self, header: &Header) {
        let op = Op::from_raw(header.op);
        if op == Some(Op::Reset) {
            return;
        }
        let rings = op == Some(Op::Request)
            && header.kind == TYPE_STREAM
            && header.dst_port == DOORBELL_PORT;
        if let Some(doorbell) = self.doorbell.take_if(|_| rings) {
            doorbell();
        }
        self.resets.push_back(header.reset());
    }

    /// Fills the guest's receive buffers. Whether there is more to do at once.
    fn deliver(&mut self, queue: &mut VirtQueue, memory: &GuestRam) -> Result<bool, DeviceError> {
        queue.disable_kicks(memory)?;
        let mut budget = PACKETS_PER_TURN;
        while budget > 0 {
            if self.resets.is_empty() && self.line.is_empty() {
                return Ok(false);
            }
            if !queue.pop(memory, &mut self.chains[0])? {
                // Only while something waits for buffers is a kick about them of interest.
                if queue.enable_kicks(memory)? {
                    queue.disable_kicks(memory)?;
                    budget -= 1;
                    continue;
                }
                return Ok(false);
            }
            let used = if let Some(header) = self.resets.pop_front() {
                put_packet(queue, memory, &self.chains[0], &header, &[])?;
                1
            } else {
                self.deliver_next(queue, memory)?
            };
            if used == 0 {
                queue.unpop();
            }
            budget = budget.saturating_sub(used.max(1));
        }
        Ok(true)
    }

    /// Lets the connection at the head of the line fill the buffer in the first chain, and others
    /// that it needs. How many buffers were used.
    fn deliver_next(
        &mut self,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<usize, DeviceError> {
        let Some(port) = self.line.pop_front() else { return Ok(0) };
        let Some(connection) = self.table.get(port) else { return Ok(0) };
        connection.queued = false;
        let used = match connection.emit() {
            Emit::Nothing => 0,
            Emit::Control(header) => {
                put_packet(queue, memory, &self.chains[0], &header, &[])?;
                1
            }
            Emit::Data(credit) => self.deliver_data(port, credit, queue, memory)?,
        };
        self.touch(port, |_| {});
        Ok(used)
    }

    /// Reads a socket once, into as many buffers as the guest has, up to a bound.
    fn deliver_data(
        &mut self,
        port: u32,
        credit: usize,
        queue: &mut VirtQueue,
        memory: &GuestRam,
    ) -> Result<usize, DeviceError> {
        let wanted = credit.min(DATA_BYTES_MAX);
        let mut taken = 1;
        let mut room = room_of(queue, &self.chains[0])?;
        while room < wanted && taken < BUFFERS_PER_READ {
            if !queue.pop(memory, &mut self.chains[taken])? {
                break;
            }
            room += room_of(queue, &self.chains[taken])?;
            taken += 1;
        }
        let Self { table, chains, data, .. } = self;
        let Some(connection) = table.get(port) else { return Ok(0) };
        let bytes = connection.read_socket(&mut data[..wanted.min(room)]);
        let mut rest = &data[..bytes];
        let mut used = 0;
        for chain in &chains[..taken] {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(room_of(queue, chain)?));
            let header = connection.data_header(u32::try_from(now.len()).unwrap_or(u32::MAX));
            put_packet(queue, memory, chain, &header, now)?;
            rest = later;
            used += 1;
        }
        // The caller puts the first one back when none was used.
        for _ in used.max(1)..taken {
            queue.unpop();
        }
        Ok(used)
    }
}

/// Bytes of data that a receive buffer has room for. At least 1, so that a read makes progress.
fn room_of(queue: &VirtQueue, chain: &Chain) -> Result<usize, GuestFault> {
    let total = usize::try_from(total_bytes(chain.writable())).unwrap_or(usize::MAX);
    match total.checked_sub(HEADER_BYTES) {
        Some(room) if room > 0 => Ok(room.min(DATA_BYTES_MAX)),
        _ => Err(queue.fault(Rule::RequestTooShort)),
    }
}

/// Puts one packet into a receive buffer and returns that to the guest.
fn put_packet(
    queue: &mut VirtQueue,
    memory: &GuestRam,
    chain: &Chain,
    header: &Header,
    data: &[u8],
) -> Result<(), GuestFault> {
    let outside = |_| queue.fault(Rule::BufferOutsideMemory);
    let segments = chain.writable();
    let header_bytes = copy_to_guest(memory, segments, 0, &header.encode()).map_err(outside)?;
    if header_bytes < HEADER_BYTES {
        return Err(queue.fault(Rule::RequestTooShort));
    }
    let data_bytes = copy_to_guest(memory, segments, HEADER_BYTES as u64, data).map_err(outside)?;
    let bytes = u32::try_from(header_bytes + data_bytes).unwrap_or(u32::MAX);
    queue.push_used(memory, chain.head(), bytes)
}

fn host(operation: &'static str) -> impl Fn(std::io::Error) -> DeviceError {
    move |source| DeviceError::Host { device: DeviceKind::Vsock, operation, source }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        // To the guest, from the guest, events (of which there are none).
        &[256, 256, 16]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64) {
        self.live = true;
    }

    fn reset(&mut self) {
        self.live = false;
        self.resets.clear();
        // The guest has forgotten every connection it knew. The line keeps ports that find nobody.
        self.table.retain(Connection::is_waiting);
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn process(
        &mut self,
        queues: &mut [VirtQueue],
        memory: &GuestRam,
        ready: Ready,
    ) -> Result<Progress, DeviceError> {
        // In the order of 5.10.2; nothing is ever sent on the third, the event queue.
        let [to_guest, from_guest, ..] = queues else { return Ok(Progress::Idle) };
        let more_events = ready.wake && self.take_events()?;
        if !self.live {
            return Ok(if more_events { Progress::More } else { Progress::Idle });
        }
        let more_packets = self.take_packets(from_guest, memory)?;
        let stalled = self.resets.len() >= RESETS_MAX;
        let more_room = self.deliver(to_guest, memory)?;
        // Packets were left because resets waited, and those have gone now.
        let resumed = stalled && self.resets.len() < RESETS_MAX;
        let more = more_events || more_packets || more_room || resumed;
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn save(&self) -> DeviceState {
        let owed = self
            .resets
            .iter()
            .map(|reset| PortPair { host: reset.src_port, guest: reset.dst_port })
            .chain(self.table.iter().filter_map(Connection::known_to_guest));
        DeviceState::Vsock(VsockState {
            generation: self.table.generation(),
            rung: self.doorbell.is_none(),
            // Resets go out before a new connection becomes known, so there are never more.
            open: owed.take(OPEN_MAX).collect(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), Unfit> {
        let DeviceState::Vsock(state) = state else {
            return Err(Unfit("the state of another device is where that of vsock belongs"));
        };
        if state.open.len() > OPEN_MAX {
            return Err(Unfit("more streams are open than vsock holds"));
        }
        if !self.table.go_on_from(state.generation) {
            return Err(Unfit("no generation of vsock ports has such a number"));
        }
        self.live = false;
        self.line.clear();
        // Sockets of the time before: their other ends see the end. So do those not taken yet.
        self.table.retain(|_| false);
        self.requests
            .take_all(|socket, _| drop(socket))
            .map_err(|_| Unfit("sockets that wait for vsock could not be taken"))?;
        let guest_cid = u64::from(self.guest_cid);
        let reset = |ports: &PortPair| Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        };
        self.resets = state.open.iter().map(reset).collect();
        if state.rung {
            self.doorbell = None;
        }
        Ok(())
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock").field("guest_cid", &self.guest_cid).finish_non_exhaustive()
    }
}
