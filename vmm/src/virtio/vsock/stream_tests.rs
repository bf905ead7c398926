//! Tests of vsock in bulk: byte streams that must arrive whole, and packets that nobody meant.

use std::io::Write;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::guest::{End, Guest, WINDOW, read_now};
use super::packet::{Header, Op};

/// Many connections, both directions at once, in steps of any size: every byte, in order.
fn pump(seed: u64, connections: u32, window: u32, buffers: u64) {
    const TOTAL: usize = 150_000;
    let mut state = seed;
    let mut random = move |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % bound
    };
    let pattern =
        |stream: usize, at: usize| u8::try_from((at * 7 + at / 256 + stream) % 256).unwrap();
    let mut guest = Guest::started(buffers);
    let mut streams: Vec<(UnixStream, End, [usize; 4])> = (0..connections)
        .map(|port| {
            let (socket, end) = guest.established(port, window);
            (socket, end, [0; 4])
        })
        .collect();
    for _ in 0..1_000_000 {
        if streams.iter().all(|(_, _, counts)| counts[1] == TOTAL && counts[3] == TOTAL) {
            return;
        }
        let which = random(streams.len());
        let (socket, end, [host_out, guest_in, guest_out, host_in]) = &mut streams[which];
        // The host writes and reads.
        let length = random(9000).min(TOTAL - *host_out);
        let bytes: Vec<u8> = (0..length).map(|n| pattern(which, *host_out + n)).collect();
        *host_out += socket.write(&bytes).unwrap_or(0);
        if random(3) == 0 {
            for byte in read_now(socket).unwrap() {
                assert_eq!(byte, pattern(which + 99, *host_in));
                *host_in += 1;
            }
        }
        // The guest reads and writes.
        for byte in end.read(random(9000)) {
            assert_eq!(byte, pattern(which, *guest_in));
            *guest_in += 1;
        }
        let credit = usize::try_from(end.credit()).unwrap();
        let length = random(20_000).min(TOTAL - *guest_out).min(credit);
        let bytes: Vec<u8> = (0..length).map(|n| pattern(which + 99, *guest_out + n)).collect();
        *guest_out += length;
        let header = if length > 0 { end.data(&bytes) } else { end.header(Op::CreditUpdate, 0, 0) };
        guest.send(header, &bytes);
        while let Some((header, data)) = guest.receive() {
            let of = |(_, end, _): &&mut (_, End, _)| end.host_port == header.src_port;
            let (_, end, _) = streams.iter_mut().find(of).unwrap();
            end.take(&header, &data);
            assert!(!end.reset);
        }
    }
    panic!("the streams stand still");
}

#[test]
fn streams_keep_every_byte_in_order() {
    pump(1, 5, WINDOW, 64);
    pump(2, 1, 64 * 1024, 1);
    pump(3, 3, 5000, 3);
}

/// A packet with fields that are often right.
fn any_header() -> impl Strategy<Value = Header> {
    let port = prop_oneof![Just(1u32), Just(2), 1024u32..1030, 2048u32..2052, any::<u32>()];
    (
        (
            prop_oneof![9 => Just(3u64), 1 => any::<u64>()],
            prop_oneof![9 => Just(2u64), 1 => any::<u64>()],
        ),
        (port.clone(), port),
        prop_oneof![Just(0u32), Just(8), 0u32..70_000, any::<u32>()],
        (
            prop_oneof![9 => Just(1u16), 1 => any::<u16>()],
            prop_oneof![9 => 0u16..9, 1 => any::<u16>()],
        ),
        (prop_oneof![0u32..4, any::<u32>()], any::<u32>(), any::<u32>()),
    )
        .prop_map(|(cids, ports, len, (kind, op), (flags, buf_alloc, fwd_cnt))| Header {
            src_cid: cids.0,
            dst_cid: cids.1,
            src_port: ports.0,
            dst_port: ports.1,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    /// Any packets at all: no panic, an end to the work, and a connection made afterwards works.
    #[test]
    fn random_packets_do_no_harm(
        packets in prop::collection::vec((any_header(), 0usize..70_000), 0..60),
        writes in prop::collection::vec(0usize..30_000, 4),
    ) {
        let mut guest = Guest::started(32);
        let mut sockets: Vec<UnixStream> = (0..4).map(|_| guest.connect(1)).collect();
        for (socket, bytes) in sockets.iter_mut().zip(&writes) {
            socket.write_all(&vec![1; *bytes]).unwrap();
        }
        for (header, length) in packets {
            guest.send(header, &vec![0; length.min(65_536)]);
            while guest.receive().is_some() {}
        }
        drop(sockets);
        guest.run();
        while guest.receive().is_some() {}
        let (mut socket, mut end) = guest.established(4000, WINDOW);
        let header = end.data(b"still here");
        guest.send(header, b"still here");
        prop_assert_eq!(read_now(&mut socket).unwrap(), b"still here");
    }
}
