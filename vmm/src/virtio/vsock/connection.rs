//! One stream between a socket of the host and a port of the guest.
//!
//! Called by the device with packets from the guest, with events of the socket, and for the next
//! packet to the guest. Refuses more bytes from the guest than it has granted, and answers whatever
//! is out of turn with a reset.
//!
//! ```text
//!   Waiting ──REQUEST──▶ Requested ──RESPONSE──▶ Established ──SHUTDOWN both──▶ Finished
//!      │                     │                        │        (to the guest)       │
//!      │ host left           │ RST                    │ RST, or SHUTDOWN both       │ RST
//!      ▼                     ▼                        ▼ (from the guest)            ▼
//!     over ◀──────────── Draining: the guest is gone, the host gets what is left ◀──┘
//! ```
//! Flow control, guest to host: the guest may have [`BUFFER_BYTES`] under way. What the socket does
//! not take at once waits in `to_host`, allocated only then; what it takes is granted again. Host to
//! guest: nothing is read from the socket beyond what the guest has granted, so nothing is kept here.

use std::collections::VecDeque;
use std::num::Wrapping;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::state::PortPair;

use super::packet::{
    HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::socket::Socket;

/// Bytes the guest may send ahead of what the socket has taken.
pub(super) const BUFFER_BYTES: u32 = 64 * 1024;
/// Newly free bytes after which the guest is told without being asked.
const TELL_CREDIT_AT: u32 = BUFFER_BYTES / 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Requested,
    Established,
    Finished,
    Draining,
}

/// What to put into the guest's next receive buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Emit {
    /// Nothing now.
    Nothing,
    /// A packet without data.
    Control(Header),
    /// Data may be read from the socket, so many bytes at most.
    Data(usize),
}

/// The stream.
#[derive(Debug)]
pub(super) struct Connection {
    guest_cid: u64,
    guest_port: u32,
    local_port: u32,
    phase: Phase,
    socket: Option<Socket>,
    readable: bool,
    /// The host's end is closed, or does not read any more.
    host_gone: bool,
    /// The host will send no more, and all it sent is on its way.
    host_ended: bool,
    /// `SHUTDOWN` flags the guest has been told, and has told.
    told_guest: u32,
    guest_told: u32,
    to_host: VecDeque<u8>,
    /// Bytes from the guest: all so far, all passed on, all passed on as the guest knows it.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// Bytes to the guest: all so far, all it has read, and its buffer.
    sent: Wrapping<u32>,
    guest_forwarded: Wrapping<u32>,
    guest_buffer: u32,
    owes_reset: bool,
    owes_credit: bool,
    asked_credit: bool,
    /// Whether the device has it in its list of connections with something to send.
    pub(super) queued: bool,
}

impl Connection {
    pub(super) fn new(socket: Socket, guest_cid: u64, guest_port: u32, local_port: u32) -> Self {
        Self {
            guest_cid,
            guest_port,
            local_port,
            phase: Phase::Waiting,
            socket: Some(socket),
            readable: false,
            host_gone: false,
            host_ended: false,
            told_guest: 0,
            guest_told: 0,
            to_host: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            sent: Wrapping(0),
            guest_forwarded: Wrapping(0),
            guest_buffer: 0,
            owes_reset: false,
            owes_credit: false,
            asked_credit: false,
            queued: false,
        }
    }

    /// Whether a packet of the guest from this port is for this connection.
    pub(super) fn is_with(&self, guest_port: u32) -> bool {
        self.guest_port == guest_port && self.phase != Phase::Draining
    }

    /// Whether the guest has not heard of it yet, so that it outlives a reset of the device.
    pub(super) fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting
    }

    /// Its ends, if the guest knows of it or is still owed a reset for it.
    pub(super) fn known_to_guest(&self) -> Option<PortPair> {
        let known = match self.phase {
            Phase::Waiting => false,
            Phase::Requested | Phase::Established | Phase::Finished => true,
            Phase::Draining => self.owes_reset,
        };
        known.then_some(PortPair { host: self.local_port, guest: self.guest_port })
    }

    /// Whether it only waits for the guest's goodbye, and its slot can be had for another.
    pub(super) fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// Whether nothing is left to do.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Draining && !self.owes_reset && self.socket.is_none()
    }

    /// Whether the guest should get a packet.
    pub(super) fn has_packet(&self) -> bool {
        self.owes_reset
            || match self.phase {
                Phase::Waiting => true,
                Phase::Established => {
                    self.shutdown_due() != 0
                        || self.owes_credit
                        || (self.can_read() && (self.credit() > 0 || !self.asked_credit))
                }
                Phase::Requested | Phase::Finished | Phase::Draining => false,
            }
    }

    /// Bytes the guest has room for. A guest whose numbers make no sense has none.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    fn can_read(&self) -> bool {
        self.readable && !self.host_ended && self.socket.is_some()
    }

    /// `SHUTDOWN` flags that hold and that the guest does not know of.
    fn shutdown_due(&self) -> u32 {
        let receive = if self.host_gone { SHUTDOWN_RECEIVE } else { 0 };
        let send = if self.host_ended { SHUTDOWN_SEND } else { 0 };
        (receive | send) & !self.told_guest
    }

    fn header(&mut self, op: Op, len: u32, flags: u32) -> Header {
        self.forwarded_told = self.forwarded;
        self.owes_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.guest_port,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// The next packet for the guest. A `Control` counts as sent.
    pub(super) fn emit(&mut self) -> Emit {
        if std::mem::take(&mut self.owes_reset) {
            return Emit::Control(self.header(Op::Reset, 0, 0));
        }
        match self.phase {
            Phase::Waiting => {
                self.phase = Phase::Requested;
                Emit::Control(self.header(Op::Request, 0, 0))
            }
            Phase::Established => self.emit_established(),
            Phase::Requested | Phase::Finished | Phase::Draining => Emit::Nothing,
        }
    }

    fn emit_established(&mut self) -> Emit {
        let due = self.shutdown_due();
        if due != 0 {
            self.told_guest |= due;
            if self.told_guest == SHUTDOWN_BOTH {
                self.phase = Phase::Finished;
                self.close_socket();
            }
            return Emit::Control(self.header(Op::Shutdown, 0, self.told_guest));
        }
        if self.can_read() {
            let credit = self.credit();
            if credit > 0 {
                return Emit::Data(usize::try_from(credit).unwrap_or(usize::MAX));
            }
            if !std::mem::replace(&mut self.asked_credit, true) {
                return Emit::Control(self.header(Op::CreditRequest, 0, 0));
            }
        }
        if self.owes_credit {
            return Emit::Control(self.header(Op::CreditUpdate, 0, 0));
        }
        Emit::Nothing
    }

    /// Reads from the socket into `buffer`, after [`Emit::Data`]. How many bytes; they must go to
    /// the guest, under [`Connection::data_header`]s.
    pub(super) fn read_socket(&mut self, buffer: &mut [u8]) -> usize {
        let Some(socket) = self.socket.as_ref().filter(|_| !buffer.is_empty()) else { return 0 };
        match socket.receive(buffer) {
            Ok(0) => self.host_ended = true,
            Ok(bytes) => return bytes,
            Err(Errno::AGAIN) => self.readable = false,
            // The host closed its end with bytes unread, or the socket is broken: the end either way.
            Err(_) => {
                self.host_ended = true;
                self.leave_host();
            }
        }
        0
    }

    /// The header of the next `bytes` of data.
    pub(super) fn data_header(&mut self, bytes: u32) -> Header {
        self.sent += Wrapping(bytes);
        self.header(Op::Data, bytes, 0)
    }

    /// Takes a packet of the guest. `data` is as long as the header says.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        let credit = self.credit();
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > credit {
            self.asked_credit = false;
        }
        match (Op::from_raw(header.op), self.phase) {
            (Some(Op::Reset), _) => self.leave_guest(),
            (Some(Op::Response), Phase::Requested) => self.phase = Phase::Established,
            (Some(Op::Data), Phase::Established) => self.receive_data(data),
            (Some(Op::Shutdown), Phase::Established | Phase::Finished) => {
                self.receive_shutdown(header.flags & SHUTDOWN_BOTH);
            }
            (Some(Op::CreditRequest), Phase::Established) => self.owes_credit = true,
            (Some(Op::CreditUpdate), Phase::Established | Phase::Finished)
            // The host is gone and the guest has been told; these crossed with it.
            | (Some(Op::Data | Op::CreditRequest), Phase::Finished) => {}
            _ => self.abort(),
        }
    }

    fn receive_data(&mut self, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let room = BUFFER_BYTES.saturating_sub((self.received - self.forwarded).0);
        if length > room || self.guest_told & SHUTDOWN_SEND != 0 {
            self.abort();
            return;
        }
        self.received += Wrapping(length);
        let taken = if self.to_host.is_empty() { self.write_socket(data) } else { 0 };
        let rest = data.get(taken..).unwrap_or_default();
        if self.host_gone {
            self.forward(data.len());
            return;
        }
        if !rest.is_empty() {
            if self.to_host.capacity() == 0 {
                // Once and in full: growing by halves would take up to twice as much.
                self.to_host.reserve_exact(BUFFER_BYTES as usize);
            }
            self.to_host.extend(rest);
        }
        self.forward(taken);
    }

    fn receive_shutdown(&mut self, flags: u32) {
        self.guest_told |= flags;
        if self.guest_told == SHUTDOWN_BOTH {
            // The guest waits for this reset before it gives its port up.
            self.owes_reset = true;
            self.leave_guest();
            return;
        }
        if self.guest_told & SHUTDOWN_RECEIVE != 0 && !self.host_ended {
            // Whoever writes to the other end now gets EPIPE.
            self.host_ended = true;
            self.shut(Shutdown::Read);
        }
        self.pass_on_end();
    }

    /// Takes events of the socket.
    pub(super) fn on_socket(&mut self, events: EventFlags) {
        let failed = events.intersects(EventFlags::HUP | EventFlags::ERR);
        if failed || events.intersects(EventFlags::IN | EventFlags::RDHUP) {
            self.readable = true;
        }
        if events.contains(EventFlags::HUP) {
            self.leave_host();
        }
        self.flush();
    }

    /// Writes what waits for the host.
    fn flush(&mut self) {
        while !self.to_host.is_empty() {
            let (first, _) = self.to_host.as_slices();
            let Some(socket) = &self.socket else { break };
            match socket.send(first) {
                Ok(0) => return,
                Ok(bytes) => {
                    self.to_host.drain(..bytes);
                    self.forward(bytes);
                }
                Err(_) => {
                    self.leave_host();
                    return;
                }
            }
        }
        self.to_host = VecDeque::new();
        self.pass_on_end();
        if self.phase == Phase::Draining {
            self.close_socket();
        }
    }

    /// Writes as much as the socket takes.
    fn write_socket(&mut self, data: &[u8]) -> usize {
        let mut written = 0;
        while let (Some(socket), Some(rest)) = (&self.socket, data.get(written..)) {
            if rest.is_empty() || self.host_gone {
                break;
            }
            match socket.send(rest) {
                Ok(0) => break,
                Ok(bytes) => written += bytes,
                Err(_) => self.leave_host(),
            }
        }
        written
    }

    /// Counts bytes as passed on, and tells the guest when that is worth a packet.
    fn forward(&mut self, bytes: usize) {
        self.forwarded += Wrapping(u32::try_from(bytes).unwrap_or(u32::MAX));
        if (self.forwarded - self.forwarded_told).0 >= TELL_CREDIT_AT {
            self.owes_credit = true;
        }
    }

    /// Passes the guest's "no more to send" on, once everything before it has gone.
    fn pass_on_end(&mut self) {
        if self.guest_told & SHUTDOWN_SEND != 0 && self.to_host.is_empty() {
            self.shut(Shutdown::Write);
        }
    }

    fn shut(&mut self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // It can only fail because the other end is gone, which an event reports as well.
            if socket.shut(how).is_err() {
                self.leave_host();
            }
        }
    }

    /// The host takes no more. What it has sent already still goes to the guest, while there is one.
    fn leave_host(&mut self) {
        self.host_gone = true;
        let waiting = std::mem::take(&mut self.to_host).len();
        self.forward(waiting);
        match self.phase {
            Phase::Waiting | Phase::Draining => self.end(),
            Phase::Requested => {
                self.owes_reset = true;
                self.end();
            }
            Phase::Established | Phase::Finished => {}
        }
    }

    /// The guest is gone. The host still gets what the guest sent.
    fn leave_guest(&mut self) {
        self.phase = Phase::Draining;
        self.flush();
    }

    /// The guest broke the protocol: the stream ends now.
    pub(super) fn abort(&mut self) {
        self.owes_reset = true;
        self.end();
    }

    fn end(&mut self) {
        self.phase = Phase::Draining;
        self.to_host = VecDeque::new();
        self.close_socket();
    }

    fn close_socket(&mut self) {
        self.socket = None;
    }
}
