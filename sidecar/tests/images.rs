//! A function without code: images in, labels out, and what is refused. That the pixels are right, `tests/python` shows.

#![cfg(feature = "images")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{sync::Arc, time::Duration};

use faaswap_protocol::{DType, Dim, Refusal, Signature, TensorSpec};
use faaswap_sidecar::{
    broker::Broker,
    config::Vision,
    infer::Function,
    server::{self, Served},
    vision::{Colors, Filter, Postprocess, Preprocess, Size},
};
use serde_json::json;
use support::{
    BODY_MAX,
    broker::{FakeBroker, Mood},
    clients::{Http, Reply},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Takes one pixel; each output is its input, doubled.
fn one_pixel(dtype: DType, channels: u64) -> Signature {
    let dims = vec![Dim::Any, Dim::Fixed(channels), Dim::Fixed(1), Dim::Fixed(1)];
    let spec = |name: &str| TensorSpec { name: name.into(), dtype, dims: dims.clone() };
    Signature { inputs: vec![spec("pixels")], outputs: vec![spec("scores")] }
}

fn before() -> Preprocess {
    Preprocess {
        input: None,
        colors: Colors::Rgb,
        resize: Some(Size::Exact(1, 1)),
        filter: Filter::Bilinear,
        crop: None,
        white: 1.0,
        mean: Vec::new(),
        std: Vec::new(),
        layout: None,
    }
}

fn vision() -> Vision {
    let labels = ["red", "green", "blue"].map(str::to_owned).to_vec();
    Vision { before: before(), after: Some(Postprocess { output: None, labels, top: 2, softmax: false }) }
}

/// A sidecar that takes images; its broker is kept.
async fn ready(signature: Signature, vision: Vision) -> (Http, FakeBroker) {
    let broker = FakeBroker::start(signature);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = Http::new(listener.local_addr().unwrap());
    let function = Function::new(support::NAME.to_owned(), 8 * BODY_MAX);
    let client = Broker::start(support::config(broker.target(), Duration::from_secs(10)));
    client.until_ready().await.unwrap();
    function.attach(client);
    let served = Served {
        function: Arc::clone(&function),
        body_bytes_max: BODY_MAX,
        upstream: None,
        vision: Some(vision),
        prefetch: true,
    };
    tokio::spawn(server::serve(listener, served, CancellationToken::new(), Duration::ZERO));
    (http, broker)
}

/// An image of one colour.
fn png(width: u32, height: u32, pixel: [u8; 3]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let pixels: Vec<u8> = (0..width * height).flat_map(|_| pixel).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    file
}

async fn post(http: &Http, image: Vec<u8>) -> Reply {
    http.post("/", &[("content-type", "image/png")], image).await
}

#[tokio::test]
async fn an_image_is_answered_with_its_best_labels_and_the_protocol_stays_beside_it() {
    let (http, broker) = ready(one_pixel(DType::F32, 3), vision()).await;
    let reply = post(&http, png(7, 5, [51, 0, 255])).await;
    let best =
        json!([{"label": "blue", "score": 2.0, "index": 2}, {"label": "red", "score": f64::from(0.4_f32), "index": 0}]);
    assert_eq!((reply.status.as_u16(), reply.json()), (200, json!({"labels": best})));
    assert_eq!(reply.header("faaswap-run-us"), "22");
    assert_eq!(broker.seen().inputs[0].shape.dims(), [1, 3, 1, 1]);
    let tensor = json!({"name": "pixels", "datatype": "FP32", "shape": [1, 3, 1, 1], "data": [1, 2, 3]});
    assert_eq!(http.infer(&json!({"inputs": [tensor]})).await.json()["outputs"][0]["data"][2], 6.0);
    assert_eq!(
        (http.get("/").await.status, http.get("/").await.header("allow")),
        (http::StatusCode::METHOD_NOT_ALLOWED, "POST")
    );
    assert!(http.post("/other", &[], "").await.error().contains("images at /"));
    broker.set_mood(Mood::Refuse(Refusal::ModelRejected { reason: "x".into() }));
    assert_eq!(post(&http, png(1, 1, [0; 3])).await.header("faaswap-refusal"), "model_rejected");
}

#[tokio::test]
async fn without_labels_the_outputs_are_answered_as_the_protocol_has_them() {
    let bare = Vision { after: None, ..vision() };
    for (dtype, numbers) in [(DType::F32, json!([2.0, 0.0, 0.0])), (DType::U8, json!([255, 0, 0]))] {
        let (http, _broker) = ready(one_pixel(dtype, 3), bare.clone()).await;
        let reply = post(&http, png(1, 1, [255, 0, 0])).await;
        assert_eq!(reply.json()["outputs"][0]["data"], numbers, "{dtype}");
    }
}

#[tokio::test]
async fn what_is_no_image_or_too_large_a_one_is_refused_before_it_takes_memory() {
    let (http, broker) = ready(one_pixel(DType::F32, 3), vision()).await;
    // The size stands in the first chunk, with a checksum behind it.
    let mut bomb = png(1, 1, [0; 3]);
    bomb[16..24].copy_from_slice(&[0, 0, 78, 32, 0, 0, 78, 32]);
    let checksum = crc(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    let cut = png(64, 64, [9; 3]);
    let cut = cut[..cut.len() - 40].to_vec();
    let mut jpeg = vec![0xff, 0xd8, 0xff];
    jpeg.extend_from_slice(&[0xe0; 40]);
    for (name, image, status, said) in [
        ("bomb", bomb, 413, "20000 x 20000 pixels"),
        ("cut", cut, 400, "cannot be decoded"),
        ("nonsense", jpeg, 400, "cannot be decoded"),
        ("text", b"GIF89a".to_vec(), 400, "neither a JPEG nor a PNG"),
        ("nothing", Vec::new(), 400, "neither a JPEG nor a PNG"),
        ("long", vec![0; BODY_MAX + 1], 413, "exceeds"),
    ] {
        let reply = post(&http, image).await;
        assert_eq!(reply.status.as_u16(), status, "{name}: {reply:?}");
        assert!(reply.error().contains(said), "{name}: {}", reply.error());
    }
    assert_eq!(broker.seen().requests, 0);
}

/// As PNG has it.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc: u32, byte| {
        crc ^= u32::from(*byte);
        (0..8).for_each(|_| crc = if crc & 1 == 1 { 0xedb8_8320 ^ (crc >> 1) } else { crc >> 1 });
        crc
    })
}

#[tokio::test]
async fn a_narrow_image_that_would_become_a_huge_one_is_refused() {
    let mut narrow = vision();
    narrow.before.resize = Some(Size::Shorter(1000));
    let (http, _broker) = ready(one_pixel(DType::F32, 3), narrow).await;
    let reply = post(&http, png(1, 20_000, [0; 3])).await;
    assert_eq!(reply.status.as_u16(), 400);
    assert!(reply.error().contains("too long and narrow"), "{}", reply.error());
}

#[tokio::test]
async fn settings_that_do_not_fit_the_model_are_the_functions_fault_and_say_what_it_takes() {
    let with = |change: &dyn Fn(&mut Vision)| {
        let mut vision = vision();
        change(&mut vision);
        vision
    };
    let cases = [
        (one_pixel(DType::I64, 3), vision(), "they are FP32, FP16 or UINT8"),
        (one_pixel(DType::F32, 4), vision(), "no place for 3 channels"),
        (one_pixel(DType::U8, 3), with(&|v| v.before.mean = vec![0.5]), "leave out mean and std"),
        (one_pixel(DType::F32, 3), with(&|v| v.before.input = Some("x".into())), "no input 'x', only pixels"),
        (one_pixel(DType::F32, 3), with(&|v| v.before.resize = Some(Size::Shorter(2))), "resize and crop give 2 x 2"),
        (one_pixel(DType::F32, 3), with(&|v| v.after.as_mut().unwrap().output = Some("y".into())), "no output 'y'"),
    ];
    for (signature, vision, said) in cases {
        let (http, _broker) = ready(signature, vision).await;
        let reply = post(&http, png(3, 3, [0; 3])).await;
        assert_eq!(reply.status.as_u16(), 500, "{reply:?}");
        assert!(reply.error().contains("do not fit the model") && reply.error().contains(said), "{}", reply.error());
    }
    let crop = with(&|v| (v.before.resize, v.before.crop) = (None, Some((4, 4))));
    let (http, _broker) = ready(one_pixel(DType::F32, 3), crop).await;
    let reply = post(&http, png(3, 9, [0; 3])).await;
    assert_eq!(reply.status.as_u16(), 400, "an image that is too small is the client's");
    assert!(reply.error().contains("set resize"), "{}", reply.error());
}
