//! A guest's vsock for tests: it answers as Linux does, or lies when told to.
//!
//! Called by the tests of the device. Refuses nothing.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::packet::{HEADER_BYTES, Header, Op};
use super::{Connector, Vsock};
use crate::virtio::driver::{BUFFERS, Driver};

pub(super) const CID: u32 = 3;
/// A guest's receive window, Linux's default.
pub(super) const WINDOW: u32 = 256 * 1024;
/// Where packets from the guest lie; the receive buffers come after.
const OUT: u64 = BUFFERS;
const IN: u64 = BUFFERS + 0x10_0000;
/// As Linux makes them.
const IN_BYTES: u32 = 3776;
const IN_STRIDE: u64 = 4096;

pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) connector: Connector,
    pub(super) rings: Arc<AtomicU32>,
    next_out: u64,
}

impl Guest {
    /// A device with a driver that has not started.
    pub(super) fn new() -> Self {
        let rings = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&rings);
        let doorbell = Box::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let (vsock, connector) = Vsock::new(CID, doorbell).unwrap();
        Self { driver: Driver::new(Box::new(vsock)), connector, rings, next_out: 0 }
    }

    /// A device with a driver and `buffers` receive buffers.
    pub(super) fn started(buffers: u64) -> Self {
        let mut guest = Self::new();
        guest.start(buffers);
        guest
    }

    pub(super) fn start(&mut self, buffers: u64) {
        self.driver.start(u64::MAX);
        self.next_out = 0;
        (0..buffers).for_each(|number| self.give_buffer(number));
    }

    /// Gives the device one more buffer to deliver into. The caller keeps to distinct numbers.
    pub(super) fn give_buffer(&mut self, number: u64) {
        self.driver.add(0, &[], &[(IN + number * IN_STRIDE, IN_BYTES)]);
        self.driver.kick(0);
    }

    /// A socket pair: one end is on its way to `port` of the guest, the other is returned.
    pub(super) fn connect(&mut self, port: u32) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        self.connector.connect(far.into(), port).unwrap();
        self.run();
        near
    }

    pub(super) fn run(&mut self) {
        self.driver.run().unwrap();
        // Sent packets come back; nothing is in them.
        while self.driver.take_used(1).is_some() {}
    }

    /// Sends any header with any data, as two descriptors.
    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        let at = OUT + self.next_out % 8 * 0x1_1000;
        self.next_out += 1;
        self.driver.put_bytes(at, &header.encode());
        self.driver.put_bytes(at + 64, data);
        let mut readable = vec![(at, u32::try_from(HEADER_BYTES).unwrap())];
        if !data.is_empty() {
            readable.push((at + 64, u32::try_from(data.len()).unwrap()));
        }
        self.driver.add(1, &readable, &[]);
        self.driver.kick(1);
        self.run();
    }

    /// The next packet for the guest, its buffer given back at once.
    pub(super) fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.receive_and_keep()?;
        self.driver.kick(0);
        self.run();
        Some((packet.1, packet.2))
    }

    /// As [`Guest::receive`], without running the device afterwards.
    fn receive_and_keep(&mut self) -> Option<(u64, Header, Vec<u8>)> {
        let (head, length) = self.driver.take_used(0)?;
        let table = self.driver.rings[0].descriptors() + 16 * u64::from(head);
        let at = u64::from_le_bytes(self.driver.bytes(table, 8).try_into().unwrap());
        let bytes = self.driver.bytes(at, usize::try_from(length).unwrap());
        let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
        let data = bytes[HEADER_BYTES..].to_vec();
        assert_eq!(usize::try_from(header.len).unwrap(), data.len());
        assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
        // A reset has the type of what it answers.
        assert!(header.kind == 1 || header.op == Op::Reset as u16);
        self.driver.add(0, &[], &[(at, IN_BYTES)]);
        Some((at, header, data))
    }

    /// The next packet, which must be `op`.
    pub(super) fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive().unwrap_or_else(|| panic!("no packet, wanted {op:?}"));
        assert_eq!(Op::from_raw(header.op), Some(op), "{header:?}");
        header
    }

    /// Connects a socket to `port` and accepts it in the guest.
    pub(super) fn established(&mut self, port: u32, window: u32) -> (UnixStream, End) {
        let socket = self.connect(port);
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        let end = End::new(&request, window);
        self.send(end.header(Op::Response, 0, 0), &[]);
        (socket, end)
    }
}

/// The guest's end of one connection, with the accounts that the specification asks for.
pub(super) struct End {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    window: u32,
    pub(super) taken: u32,
    pub(super) sent: u32,
    host_window: u32,
    host_taken: u32,
    /// Data from the host that the guest's program has not read.
    pub(super) inbox: Vec<u8>,
    pub(super) shutdown: u32,
    pub(super) reset: bool,
}

impl End {
    fn new(request: &Header, window: u32) -> Self {
        Self {
            host_port: request.src_port,
            guest_port: request.dst_port,
            window,
            taken: 0,
            sent: 0,
            host_window: request.buf_alloc,
            host_taken: request.fwd_cnt,
            inbox: Vec::new(),
            shutdown: 0,
            reset: false,
        }
    }

    pub(super) fn header(&self, op: Op, len: u32, flags: u32) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len,
            kind: 1,
            op: op as u16,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.taken,
        }
    }

    /// Bytes the device has granted.
    pub(super) fn credit(&self) -> u32 {
        self.host_window - self.sent.wrapping_sub(self.host_taken)
    }

    pub(super) fn data(&mut self, bytes: &[u8]) -> Header {
        let length = u32::try_from(bytes.len()).unwrap();
        self.sent = self.sent.wrapping_add(length);
        self.header(Op::Data, length, 0)
    }

    /// Takes a packet of the device; whether it wants an answer with the credit.
    pub(super) fn take(&mut self, header: &Header, data: &[u8]) -> bool {
        assert_eq!((header.src_port, header.dst_port), (self.host_port, self.guest_port));
        self.host_window = header.buf_alloc;
        self.host_taken = header.fwd_cnt;
        self.inbox.extend_from_slice(data);
        assert!(self.inbox.len() <= usize::try_from(self.window).unwrap(), "the device overran");
        match Op::from_raw(header.op).unwrap() {
            Op::Shutdown => self.shutdown |= header.flags,
            Op::Reset => self.reset = true,
            Op::CreditRequest => return true,
            Op::Data | Op::CreditUpdate => {}
            other => panic!("{other:?} in an open connection"),
        }
        false
    }

    /// The guest's program reads up to `length` bytes.
    pub(super) fn read(&mut self, length: usize) -> Vec<u8> {
        let length = length.min(self.inbox.len());
        self.taken = self.taken.wrapping_add(u32::try_from(length).unwrap());
        self.inbox.drain(..length).collect()
    }
}

/// Reads what is there: `None` at the end of the stream.
pub(super) fn read_now(socket: &mut UnixStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) if all.is_empty() => return None,
            Ok(0) => return Some(all),
            Ok(bytes) => all.extend_from_slice(&buffer[..bytes]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(all),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        }
    }
}
