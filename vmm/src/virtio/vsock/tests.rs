//! Tests of vsock: the life of connections, their accounts, and guests that lie.

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use mica_wire::guest::DOORBELL_PORT;

use super::connection::BUFFER_BYTES;
use super::guest::{CID, Guest, WINDOW, read_now};
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::table::CONNECTIONS_MAX;
use crate::virtio::driver::BUFFERS;

fn is_closed(socket: &mut UnixStream) -> bool {
    read_now(socket).is_none()
}

#[test]
fn bytes_go_both_ways_and_packets_are_batched() {
    let mut guest = Guest::started(64);
    let (mut socket, mut end) = guest.established(1024, WINDOW);
    socket.write_all(b"to the guest").unwrap();
    guest.run();
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, &data[..]), (Op::Data as u16, &b"to the guest"[..]));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 0));
    let header = end.data(b"to the host");
    guest.send(header, b"to the host");
    assert_eq!(read_now(&mut socket).unwrap(), b"to the host");
    // A large write arrives in pieces of the guest's buffers, with nothing lost.
    let large: Vec<u8> = (0..50_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    socket.write_all(&large).unwrap();
    guest.run();
    let mut got = Vec::new();
    while let Some((header, data)) = guest.receive() {
        assert_eq!(header.op, Op::Data as u16);
        got.extend_from_slice(&data);
    }
    assert!(got == large);
}

#[test]
fn connections_wait_for_the_driver() {
    let mut guest = Guest::new();
    let mut sockets: Vec<UnixStream> = (0..3).map(|port| guest.connect(1000 + port)).collect();
    sockets[1].shutdown(Shutdown::Both).unwrap();
    drop(sockets.remove(1));
    guest.run();
    // A driver resets the device before it starts, and that must not cost them either.
    guest.start(8);
    guest.run();
    assert_eq!(guest.expect(Op::Request).dst_port, 1000);
    assert_eq!(guest.expect(Op::Request).dst_port, 1002);
    assert!(guest.receive().is_none(), "the one whose host left is forgotten");
    assert!(sockets.iter_mut().all(|socket| !is_closed(socket)));
    // A reset now costs them: the guest has forgotten them.
    guest.start(8);
    guest.run();
    assert!(sockets.iter_mut().all(is_closed));
    assert!(guest.receive().is_none());
}

#[test]
fn a_guest_that_refuses_closes_the_socket() {
    let mut guest = Guest::started(8);
    let mut socket = guest.connect(77);
    let request = guest.expect(Op::Request);
    guest.send(Header { kind: 1, ..request.reset() }, &[]);
    assert!(is_closed(&mut socket));
    assert!(guest.receive().is_none());
}

#[test]
fn guest_initiated_connections_are_reset_and_the_doorbell_rings_once() {
    let mut guest = Guest::started(8);
    for (port, rings) in [(9, 0), (DOORBELL_PORT, 1), (DOORBELL_PORT, 1)] {
        let header = Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: 5000,
            dst_port: port,
            kind: 1,
            op: Op::Request as u16,
            ..Header::default()
        };
        guest.send(header, &[]);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (port, 5000));
        assert_eq!(guest.rings.load(Ordering::SeqCst), rings);
    }
}

#[test]
fn a_host_that_leaves_is_told_to_the_guest_at_once() {
    let mut guest = Guest::started(8);
    let (socket, mut end) = guest.established(1, WINDOW);
    drop(socket);
    guest.run();
    while let Some((header, data)) = guest.receive() {
        end.take(&header, &data);
    }
    assert_eq!(end.shutdown, SHUTDOWN_BOTH);
    // What crosses on the way is not punished; the guest's reset ends it.
    let header = end.data(b"late");
    guest.send(header, b"late");
    assert!(guest.receive().is_none());
    guest.send(end.header(Op::Reset, 0, 0), &[]);
    assert!(guest.receive().is_none());
    guest.send(end.header(Op::CreditUpdate, 0, 0), &[]);
    guest.expect(Op::Reset);
}

#[test]
fn a_host_that_leaves_before_the_answer_resets_the_request() {
    let mut guest = Guest::started(8);
    let socket = guest.connect(1);
    let request = guest.expect(Op::Request);
    drop(socket);
    guest.run();
    let reset = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (request.src_port, 1));
}

#[test]
fn what_the_host_wrote_before_it_left_arrives() {
    let mut guest = Guest::started(4);
    // A small window: the data cannot all go before the end is seen.
    let (mut socket, mut end) = guest.established(1, 1000);
    let text: Vec<u8> = (0..5000u32).map(|n| u8::try_from(n % 250).unwrap()).collect();
    socket.write_all(&text).unwrap();
    drop(socket);
    guest.run();
    let mut got = Vec::new();
    for _ in 0..100 {
        while let Some((header, data)) = guest.receive() {
            end.take(&header, &data);
        }
        assert_ne!(end.shutdown & SHUTDOWN_RECEIVE, 0, "told at once that nobody reads");
        if end.shutdown == SHUTDOWN_BOTH {
            got.extend(end.read(usize::MAX));
            break;
        }
        got.extend(end.read(700));
        guest.send(end.header(Op::CreditUpdate, 0, 0), &[]);
    }
    assert!(got == text, "{} of {} bytes", got.len(), text.len());
}

#[test]
fn half_closes_pass_in_both_directions() {
    let mut guest = Guest::started(8);
    let (mut socket, mut end) = guest.established(1, WINDOW);
    // The host ends its direction; the guest still sends.
    socket.write_all(b"question").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    guest.run();
    while let Some((header, data)) = guest.receive() {
        end.take(&header, &data);
    }
    assert_eq!((&end.inbox[..], end.shutdown), (&b"question"[..], SHUTDOWN_SEND));
    let header = end.data(b"answer");
    guest.send(header, b"answer");
    guest.send(end.header(Op::Shutdown, 0, SHUTDOWN_SEND), &[]);
    assert_eq!(read_now(&mut socket).unwrap(), b"answer");
    assert!(is_closed(&mut socket));
    // Both directions have ended, and that ends the connection.
    guest.run();
    while let Some((header, data)) = guest.receive() {
        end.take(&header, &data);
    }
    assert_eq!(end.shutdown, SHUTDOWN_BOTH);

    // The guest ends its direction; the host still sends.
    let (mut socket, mut end) = guest.established(2, WINDOW);
    guest.send(end.header(Op::Shutdown, 0, SHUTDOWN_SEND), &[]);
    assert!(is_closed(&mut socket), "the host reads the end");
    socket.write_all(b"more").unwrap();
    guest.run();
    let mut data = Vec::new();
    while let Some((header, bytes)) = guest.receive() {
        if header.src_port == end.host_port {
            end.take(&header, &bytes);
            data.extend_from_slice(&bytes);
        }
    }
    assert_eq!(data, b"more");
    // Data after its own end is out of turn.
    let header = end.data(b"x");
    guest.send(header, b"x");
    guest.expect(Op::Reset);
    // The guest will not receive: the host's writes fail.
    let (mut socket, end) = guest.established(3, WINDOW);
    guest.send(end.header(Op::Shutdown, 0, SHUTDOWN_RECEIVE), &[]);
    let error = socket.write(b"x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_guest_that_closes_gets_its_reset_and_the_host_gets_everything() {
    let mut guest = Guest::started(8);
    for op in [Op::Shutdown, Op::Reset] {
        let (mut socket, mut end) = guest.established(1, WINDOW);
        // More than the socket takes at once, so some of it waits in the device.
        let mut sent = Vec::new();
        while sent.len() < 200 * 1024 || end.credit() == BUFFER_BYTES {
            let bytes = vec![u8::try_from(sent.len() / 1000 % 251).unwrap(); 8192];
            if end.credit() < 8192 {
                break;
            }
            let header = end.data(&bytes);
            guest.send(header, &bytes);
            sent.extend(bytes);
            while let Some((header, data)) = guest.receive() {
                end.take(&header, &data);
            }
        }
        guest.send(end.header(op, 0, SHUTDOWN_BOTH), &[]);
        if op == Op::Shutdown {
            guest.expect(Op::Reset);
        }
        let mut got = Vec::new();
        while let Some(data) = read_now(&mut socket) {
            got.extend(data);
            guest.run();
        }
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
        assert!(guest.receive().is_none());
    }
}

#[test]
fn a_slow_host_stops_the_guest_and_a_fast_one_lets_it_go_on() {
    let mut guest = Guest::started(8);
    let (mut socket, mut end) = guest.established(1, WINDOW);
    let chunk = [7u8; 4096];
    let mut sent = 0;
    for _ in 0..1000 {
        while let Some((header, data)) = guest.receive() {
            end.take(&header, &data);
        }
        if end.credit() < 4096 {
            break;
        }
        let header = end.data(&chunk);
        guest.send(header, &chunk);
        sent += chunk.len();
    }
    assert!(end.credit() < 4096, "the credit runs out after {sent} bytes");
    // Beyond what is granted a byte is one too many; but first, a fast reader frees it.
    let mut got = 0;
    while got < sent {
        got += read_now(&mut socket).unwrap().len();
        guest.run();
    }
    while let Some((header, data)) = guest.receive() {
        end.take(&header, &data);
    }
    assert!(end.credit() >= BUFFER_BYTES / 2, "granted again without being asked");
    guest.send(end.header(Op::CreditRequest, 0, 0), &[]);
    let update = guest.expect(Op::CreditUpdate);
    assert_eq!(usize::try_from(update.fwd_cnt).unwrap(), sent);
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset() {
    let mut guest = Guest::started(8);
    let (mut socket, mut end) = guest.established(1, WINDOW);
    let chunk = [7u8; 16384];
    let mut sends = 0;
    let reset = loop {
        // It never looks at the credit.
        let header = end.data(&chunk);
        guest.send(header, &chunk);
        sends += 1;
        let mut reset = false;
        while let Some((header, _)) = guest.receive() {
            reset |= header.op == Op::Reset as u16;
        }
        if reset || sends > 1000 {
            break reset;
        }
    };
    assert!(reset);
    assert!(is_closed(&mut socket) || is_closed(&mut socket), "and the host sees the end");
}

#[test]
fn a_slow_guest_stops_the_host() {
    let mut guest = Guest::started(8);
    let (mut socket, mut end) = guest.established(1, 10_000);
    let mut written = 0;
    loop {
        match socket.write(&[3; 8192]) {
            Ok(bytes) => written += bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        guest.run();
        assert!(written < 4 << 20, "the host was never stopped");
    }
    let mut asked = false;
    while let Some((header, data)) = guest.receive() {
        asked |= end.take(&header, &data);
    }
    assert_eq!(end.inbox.len(), 10_000);
    assert!(asked, "the device asks once when it has none left");
    // A guest that answers without granting more is not asked again and again.
    guest.send(end.header(Op::CreditUpdate, 0, 0), &[]);
    assert!(guest.receive().is_none());
    end.read(4000);
    guest.send(end.header(Op::CreditUpdate, 0, 0), &[]);
    while let Some((header, data)) = guest.receive() {
        end.take(&header, &data);
    }
    assert_eq!(end.inbox.len(), 10_000);
}

#[test]
fn nonsense_for_a_connection_resets_it_and_no_other() {
    type Change = fn(&mut Header);
    let changes: [Change; 9] = [
        |h| h.op = 0,
        |h| h.op = 99,
        |h| h.op = Op::Request as u16,
        |h| h.op = Op::Response as u16,
        |h| h.len = 5,
        |h| h.len = 3,
        |h| h.len = u32::MAX,
        |h| h.kind = 2,
        |h| h.kind = 0,
    ];
    let mut guest = Guest::started(8);
    let (mut other, mut other_end) = guest.established(9, WINDOW);
    for (number, change) in changes.into_iter().enumerate() {
        let (mut socket, mut end) = guest.established(1, WINDOW);
        let mut header = end.data(b"1234");
        change(&mut header);
        guest.send(header, b"1234");
        if header.len == 3 {
            // Less than the chain holds is in form: padding.
            assert_eq!(read_now(&mut socket).unwrap(), b"123");
            drop(socket);
            guest.run();
            while guest.receive().is_some() {}
            continue;
        }
        guest.expect(Op::Reset);
        assert!(is_closed(&mut socket), "change {number}");
    }
    let header = other_end.data(b"ok");
    guest.send(header, b"ok");
    assert_eq!(read_now(&mut other).unwrap(), b"ok");
}

#[test]
fn packets_from_or_to_others_are_dropped() {
    let mut guest = Guest::started(8);
    let (mut socket, end) = guest.established(1, WINDOW);
    let good = end.header(Op::Reset, 0, 0);
    guest.send(Header { src_cid: 4, ..good }, &[]);
    guest.send(Header { dst_cid: 3, ..good }, &[]);
    guest.send(Header { src_cid: u64::from(CID) | 1 << 32, ..good }, &[]);
    assert!(guest.receive().is_none());
    assert!(!is_closed(&mut socket));
    // From another port of the guest: no connection, so a reset to that port.
    guest.send(Header { src_port: 2, op: Op::Data as u16, ..good }, &[]);
    assert_eq!(guest.expect(Op::Reset).dst_port, 2);
    assert!(!is_closed(&mut socket));
}

#[test]
fn resets_for_strangers_are_bounded_by_the_guest_itself() {
    let mut guest = Guest::started(0);
    let stranger = Header {
        src_cid: u64::from(CID),
        dst_cid: 2,
        kind: 1,
        op: Op::Data as u16,
        ..Header::default()
    };
    for port in 0..200 {
        let at = BUFFERS + 0x40_0000 + u64::from(port) * 64;
        guest.driver.put_bytes(at, &Header { src_port: port, ..stranger }.encode());
        guest.driver.add(1, &[(at, 44)], &[]);
        guest.driver.kick(1);
        guest.driver.run().unwrap();
    }
    let taken = std::iter::from_fn(|| guest.driver.take_used(1)).count();
    assert!(taken < 100, "{taken} packets were taken");
    // Most packets wait in the guest's own ring. Now it takes answers.
    for number in 0..4 {
        guest.give_buffer(number);
    }
    guest.run();
    for port in 0..200 {
        assert_eq!(guest.expect(Op::Reset).dst_port, port);
    }
    assert!(guest.receive().is_none());
}

#[test]
fn resets_that_go_out_let_the_next_packets_in_without_a_kick() {
    let mut guest = Guest::started(200);
    let stranger = Header {
        src_cid: u64::from(CID),
        dst_cid: 2,
        kind: 1,
        op: Op::Data as u16,
        ..Header::default()
    };
    guest.driver.put_bytes(BUFFERS, &stranger.encode());
    for _ in 0..200 {
        guest.driver.add(1, &[(BUFFERS, 44)], &[]);
    }
    guest.driver.kick(1);
    guest.driver.run().unwrap();
    let answers = std::iter::from_fn(|| guest.driver.take_used(0)).count();
    assert_eq!(answers, 200);
}

#[test]
fn buffers_that_a_short_read_did_not_need_are_still_there() {
    let mut guest = Guest::started(33);
    let (mut socket, _end) = guest.established(1, WINDOW);
    let count = |guest: &mut Guest| {
        guest.driver.run().unwrap();
        std::iter::from_fn(|| guest.driver.take_used(0)).count()
    };
    // The request's buffer was given back, so there are 33; each of these takes one.
    for _ in 0..3 {
        socket.write_all(b"short").unwrap();
        assert_eq!(count(&mut guest), 1);
    }
    socket.write_all(&vec![0; 29 * (3776 - 44) + 1]).unwrap();
    assert_eq!(count(&mut guest), 30);
}

#[test]
fn the_table_is_bounded_and_finished_connections_make_room() {
    let mut guest = Guest::started(64);
    let mut sockets = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        let (socket, end) = guest.established(1, WINDOW);
        sockets.push((socket, end));
    }
    let mut refused = guest.connect(1);
    assert!(is_closed(&mut refused));
    // One host leaves; the guest never says goodbye.
    drop(sockets.remove(100));
    guest.run();
    while guest.receive().is_some() {}
    let (mut socket, mut end) = guest.established(5, WINDOW);
    let header = end.data(b"hi");
    guest.send(header, b"hi");
    assert_eq!(read_now(&mut socket).unwrap(), b"hi");
}

#[test]
fn one_connection_does_not_starve_another() {
    let mut guest = Guest::started(8);
    let (mut greedy, mut greedy_end) = guest.established(1, u32::MAX);
    let (mut modest, modest_end) = guest.established(2, WINDOW);
    greedy.write_all(&vec![1; 100_000]).unwrap();
    modest.write_all(b"me too").unwrap();
    guest.run();
    let mut before = 0;
    loop {
        let (header, data) = guest.receive().unwrap();
        if header.src_port == modest_end.host_port {
            break;
        }
        before += data.len();
        greedy_end.inbox.clear();
    }
    assert!(before <= 64 * 1024, "it waited for {before} bytes of the other");
}
