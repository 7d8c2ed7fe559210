//! Pins the bytes of every message, and throws arbitrary bytes at the decoder.
//!
//! A change here breaks sidecars that are already deployed: raise `WIRE_VERSION` and describe it in WIRE.md. The golden
//! file is rewritten with `BLESS=1 cargo test -p faaswap-protocol`; read the difference before committing it.

use std::{fmt::Debug, path::Path, time::Duration};

use faaswap_protocol::{
    Batching, Bytes, CallId, DType, Detail, Dim, FromBroker, FunctionId, FunctionSpec, Late, ModelDigest, ModelFile,
    Priority, Refusal, RequestId, Shape, Signature, SlabLayout, Slo, Span, TensorSlice, TensorSpec, Tf32, Timing,
    ToBroker, Transport,
    limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, WIRE_VERSION},
    wire::{HEAD_LEN, Head, WireError, decode, encode},
};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};

fn tensor(index: u16) -> TensorSlice {
    let shape = Shape::new([1, 3, 224, 224]).expect("small");
    TensorSlice { index, dtype: DType::F32, shape, span: Span { offset: 4096, len: 602_112 } }
}

fn function() -> FunctionSpec {
    FunctionSpec {
        name: "team/resnet-50".parse().expect("a name"),
        model: ModelDigest([7; 32]),
        slo: Slo { deadline: Duration::from_millis(80), percentile: 9800 },
        priority: Priority::Batch,
        late: Late::Refuse,
        batching: Batching::On,
        tf32: Tf32::Off,
    }
}

fn to_broker() -> Vec<ToBroker> {
    let (call, request) = (CallId(3), RequestId(77));
    let transport = Transport::Slab { request: Bytes::mib(16), response: Bytes::mib(8) };
    vec![
        ToBroker::Hello { version: WIRE_VERSION, transport, agent: "test/1".to_owned() },
        ToBroker::Hello { version: WIRE_VERSION, transport: Transport::Inline, agent: String::new() },
        ToBroker::Register { call, function: function() },
        ToBroker::Upload {
            call,
            model: ModelDigest([7; 32]),
            files: vec![ModelFile { path: "model.onnx".to_owned(), len: Bytes::new(1234) }],
        },
        ToBroker::UploadPart { call },
        ToBroker::Unregister { function: FunctionId(5) },
        ToBroker::Infer {
            request,
            function: FunctionId(5),
            inputs: vec![tensor(0)],
            outputs: vec![0, 2],
            time_left: Some(Duration::from_micros(1500)),
        },
        ToBroker::Cancel { request },
        ToBroker::Release { request },
        ToBroker::Ping { nonce: u64::MAX },
        ToBroker::Expect { function: FunctionId(5), soon: true },
        ToBroker::Hurry { call },
    ]
}

fn from_broker() -> Vec<FromBroker> {
    let (call, request) = (CallId(3), RequestId(77));
    let spec = TensorSpec { name: "x".to_owned(), dtype: DType::F16, dims: vec![Dim::Any, Dim::Fixed(3)] };
    let signature = Signature { inputs: vec![spec.clone()], outputs: vec![spec] };
    let timing = Timing {
        queued: Duration::from_micros(10),
        ran: Duration::from_millis(2),
        swapping: Duration::from_millis(1),
        was_resident: false,
    };
    let slab = Some(SlabLayout { request: Bytes::mib(16), response: Bytes::mib(8) });
    let mut messages = vec![
        FromBroker::Welcome { version: WIRE_VERSION, slab },
        FromBroker::ModelNeeded { call },
        FromBroker::Uploaded { call },
        FromBroker::Preparing { call, stage: "optimizing".to_owned() },
        FromBroker::Registered { call, function: FunctionId(5), signature, weights: Bytes::mib(98) },
        FromBroker::CallRefused { call, refusal: Refusal::NameTaken },
        FromBroker::Answer { request, outputs: vec![tensor(0)], timing },
        FromBroker::Draining,
        FromBroker::Pong { nonce: 1 },
        FromBroker::Closing { refusal: Refusal::ProtocolViolation { reason: Detail::from("why") } },
    ];
    messages.extend(refusals().into_iter().map(|refusal| FromBroker::Refused { request, refusal }));
    messages
}

fn refusals() -> Vec<Refusal> {
    let reason = || Detail::from("why");
    let (needed, capacity, left, size) = (Bytes::new(4), Bytes::new(3), Bytes::new(2), Bytes::new(1));
    let (short, long) = (Duration::from_millis(1), Duration::from_secs(1));
    vec![
        Refusal::UnknownFunction,
        Refusal::ModelRejected { reason: reason() },
        Refusal::ModelTooLarge { needed, capacity },
        Refusal::HostMemoryFull { needed, left },
        Refusal::UploadFailed { reason: reason() },
        Refusal::FunctionInvalid { reason: reason() },
        Refusal::NameTaken,
        Refusal::FunctionsFull { limit: 9 },
        Refusal::InputInvalid { reason: reason() },
        Refusal::DeadlinePassed { late_by: short },
        Refusal::DeadlineUnreachable { needed: long, left: short },
        Refusal::FunctionQueueFull { limit: 9 },
        Refusal::NodeQueueFull { limit: 9 },
        Refusal::ConnectionFull { limit: 9 },
        Refusal::SlabFull { needed, size },
        Refusal::Cancelled,
        Refusal::Draining,
        Refusal::RunFailed { reason: reason() },
        Refusal::HardwareFault,
        Refusal::ProtocolViolation { reason: reason() },
        Refusal::ModelSuspended { left: long },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Encodes one message, reads it back, and gives one line for the golden file.
fn line<M: Serialize + DeserializeOwned + PartialEq + Debug>(message: &M) -> String {
    let mut frame = Vec::new();
    encode(message, 5, &mut frame).expect("ours encode");
    let head = Head::decode(frame[..HEAD_LEN].try_into().expect("8 bytes")).expect("a good head");
    assert_eq!((head.message_len as usize, head.payload_len), (frame.len() - HEAD_LEN, 5));
    assert_eq!(&decode::<M>(&frame[HEAD_LEN..]).expect("it reads back"), message);
    format!("{message:?}\n  {}\n", hex(&frame))
}

#[test]
fn the_bytes_of_every_message_are_pinned() {
    let seen: String = to_broker().iter().map(line).chain(from_broker().iter().map(line)).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/messages.txt");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &seen).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(&path).expect("the golden file is there");
    for (have, want) in seen.lines().zip(golden.lines()) {
        assert_eq!(have, want, "the wire changed: see the head of this file");
    }
    assert_eq!(seen.lines().count(), golden.lines().count());
}

#[test]
fn codes_of_refusals_are_distinct() {
    let mut codes: Vec<_> = refusals().iter().map(Refusal::code).collect();
    codes.sort_unstable();
    codes.dedup();
    assert_eq!(codes.len(), refusals().len());
}

#[test]
fn lengths_beyond_the_limits_are_refused_before_anything_is_read() {
    let head = |message: u32, payload: u32| {
        let mut bytes = [0; HEAD_LEN];
        bytes[..4].copy_from_slice(&message.to_le_bytes());
        bytes[4..].copy_from_slice(&payload.to_le_bytes());
        Head::decode(bytes)
    };
    assert_eq!(head(0, 0), Err(WireError::MessageLength { len: 0 }));
    assert_eq!(head(MESSAGE_BYTES_MAX + 1, 0), Err(WireError::MessageLength { len: MESSAGE_BYTES_MAX + 1 }));
    assert_eq!(head(1, PAYLOAD_BYTES_MAX + 1), Err(WireError::PayloadLength { len: PAYLOAD_BYTES_MAX + 1 }));
    assert!(head(MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX).is_ok());
}

#[test]
fn a_message_that_is_too_long_leaves_the_buffer_as_it_was() {
    let mut out = b"before".to_vec();
    let agent = "x".repeat(MESSAGE_BYTES_MAX as usize);
    let hello = ToBroker::Hello { version: 1, transport: Transport::Inline, agent };
    assert_eq!(encode(&hello, 0, &mut out), Err(WireError::TooLong));
    assert_eq!(out, b"before");
}

#[test]
fn a_list_that_claims_to_be_huge_allocates_nothing_of_that_size() {
    // Infer with inputs announced as 2^62 entries and nothing behind it.
    let mut bytes = vec![5, 77, 5];
    bytes.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x3f]);
    assert_eq!(decode::<ToBroker>(&bytes), Err(WireError::Malformed));
}

#[test]
fn bytes_after_a_message_are_an_error() {
    assert_eq!(decode::<ToBroker>(&[8, 1, 0]), Err(WireError::Trailing { len: 1 }));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _malformed_or_not = (decode::<ToBroker>(&bytes), decode::<FromBroker>(&bytes));
    }

    #[test]
    fn a_flipped_byte_is_an_error_or_another_message(which in 0..10_usize, at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut frame = Vec::new();
        encode(&to_broker()[which], 0, &mut frame).expect("ours encode");
        let body = &mut frame[HEAD_LEN..];
        let at = at.index(body.len());
        body[at] = to;
        if let Ok(ToBroker::Infer { inputs, .. }) = decode::<ToBroker>(&frame[HEAD_LEN..]) {
            for input in inputs {
                let _checked = (input.shape.size(input.dtype), input.span.fits(Bytes::mib(1)));
            }
        }
    }
}
