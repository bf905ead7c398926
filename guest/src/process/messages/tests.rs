//! Messages as clients send and read them, in both codecs.

use super::*;
use crate::connect::Codec;

fn read<T: crate::connect::Request>(text: &str) -> T {
    Codec::Json.decode(text.as_bytes()).unwrap()
}

#[test]
fn requests_are_read_as_clients_send_them() {
    let request: StartRequest = read(
        r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","echo hi"],
        "envs":{"A":"1"},"cwd":"/tmp"},"stdin":false,"later":1}"#,
    );
    assert_eq!(request.process.unwrap().args.len(), 3);
    assert_eq!(request.stdin, Some(false));
    let request: StartRequest =
        read(r#"{"process":{"cmd":"sh"},"pty":{"size":{"cols":80,"rows":24}},"tag":"t"}"#);
    assert_eq!(request.pty.unwrap().size, Some(PtySize { cols: 80, rows: 24 }));
    let request: StartRequest =
        read(r#"{"process":{"cmd":"sh","args":null,"envs":null,"cwd":null},"pty":null}"#);
    assert_eq!(request.process.unwrap().cmd, "sh");
    let request: SendInputRequest =
        read(r#"{"process":{"tag":"t","later":1},"input":{"stdin":"aGk="}}"#);
    assert_eq!(named(request.process.as_ref()), Ok(&Selector::Tag("t".to_owned())));
    assert_eq!(brought(request.input.as_ref()), Ok(&Input::Stdin(b"hi".to_vec())));
    for text in [r#"{"process":{}}"#, "{}", r#"{"process":{"pid":null,"tag":null}}"#] {
        let request: SelectRequest = read(text);
        named(request.process.as_ref()).unwrap_err();
    }
    let request: StreamInputRequest = read(r#"{"start":{"process":{"pid":"42"}}}"#);
    let Some(InputEvent::Start(start)) = request.event else { panic!("{request:?}") };
    assert_eq!(named(start.process.as_ref()), Ok(&Selector::Pid(42)));
    let request: StreamInputRequest = read(r#"{"keepalive":{}}"#);
    assert_eq!(request.event, Some(InputEvent::Keepalive(Nothing {})));
}

#[test]
fn what_is_out_of_form_is_said_to_be() {
    fn refused<T: crate::connect::Request + std::fmt::Debug>(text: &str, why: &str) {
        let error = Codec::Json.decode::<T>(text.as_bytes()).unwrap_err();
        assert_eq!(error.code, crate::connect::Code::InvalidArgument, "{text}");
        assert!(error.message.contains(why), "{text}: {}", error.message);
    }
    refused::<SelectRequest>(r#"{"process":{"pid":-7}}"#, "no number");
    refused::<SelectRequest>(r#"{"process":{"pid":1,"tag":"t"}}"#, "not both");
    refused::<SendInputRequest>(r#"{"input":{"stdin":"!"}}"#, "Invalid");
    refused::<SendInputRequest>(r#"{"input":{"stdin":"","pty":""}}"#, "not both");
    refused::<StreamInputRequest>(r#"{"start":{},"keepalive":{}}"#, "one of");
}

#[test]
fn null_is_the_default_of_every_field() {
    fn same<T: crate::connect::Request + PartialEq + std::fmt::Debug>(null: &str, plain: &str) {
        assert_eq!(read::<T>(null), read::<T>(plain), "{null}");
    }
    same::<StartRequest>(r#"{"process":null,"pty":null,"tag":null,"stdin":null}"#, "{}");
    same::<StartRequest>(
        r#"{"process":{"cmd":null,"args":null,"envs":null,"cwd":null},"pty":{"size":null}}"#,
        r#"{"process":{},"pty":{}}"#,
    );
    same::<UpdateRequest>(
        r#"{"process":{"pid":1,"tag":null},"pty":{"size":{"cols":null,"rows":null}}}"#,
        r#"{"process":{"pid":1},"pty":{"size":{}}}"#,
    );
    same::<UpdateRequest>(r#"{"process":null,"pty":null}"#, "{}");
    let by_tag = r#"{"process":{"tag":"t"}}"#;
    same::<SelectRequest>(r#"{"process":{"pid":null,"tag":"t"}}"#, by_tag);
    let typed = r#"{"input":{"pty":"aGk="}}"#;
    same::<SendInputRequest>(r#"{"process":null,"input":{"stdin":null,"pty":"aGk="}}"#, typed);
    same::<SendInputRequest>(r#"{"input":null}"#, "{}");
    same::<StreamInputRequest>(
        r#"{"start":null,"data":{"input":null},"keepalive":null}"#,
        r#"{"data":{}}"#,
    );
    same::<SendSignalRequest>(r#"{"process":null,"signal":null}"#, "{}");
}

#[test]
fn events_are_written_as_clients_read_them() {
    let text = |event| serde_json::to_string(&EventResponse::from(event)).unwrap();
    assert_eq!(text(Event::Start(StartEvent { pid: 42 })), r#"{"event":{"start":{"pid":42}}}"#);
    let output = Some(Data::Stdout(b"hi".to_vec()));
    assert_eq!(text(Event::Data(DataEvent { output })), r#"{"event":{"data":{"stdout":"aGk="}}}"#);
    assert_eq!(text(Event::Keepalive(Nothing {})), r#"{"event":{"keepalive":{}}}"#);
}

#[test]
fn binary_messages_have_the_protocols_numbers() {
    // Field 1, a message: field 3, a message: the fields of the end; -1 is 1 in zigzag.
    let end =
        End { exit_code: -1, exited: true, status: "s".to_owned(), error: Some("e".to_owned()) };
    let bytes = Codec::Proto.encode(&EventResponse::from(Event::End(end))).unwrap();
    assert_eq!(&bytes[..], b"\x0a\x0c\x1a\x0a\x08\x01\x10\x01\x1a\x01s\x22\x01e");
    let request: StreamInputRequest = Codec::Proto.decode(b"\x12\x06\x12\x04\x0a\x02hi").unwrap();
    let Some(InputEvent::Data(data)) = request.event else { panic!("{request:?}") };
    assert_eq!(brought(data.input.as_ref()), Ok(&Input::Stdin(b"hi".to_vec())));
    let request: SendSignalRequest = Codec::Proto.decode(b"\x0a\x02\x08\x2a\x10\x0f").unwrap();
    assert_eq!(request.signal, 15);
    assert_eq!(named(request.process.as_ref()), Ok(&Selector::Pid(42)));
    let request: StartRequest = Codec::Proto.decode(b"\x0a\x04\x0a\x02sh\x20\x00").unwrap();
    assert_eq!((request.process.unwrap().cmd.as_str(), request.stdin), ("sh", Some(false)));
}
