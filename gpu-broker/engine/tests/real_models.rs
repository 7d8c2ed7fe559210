//! Real models give, late-bound and while their weights are still arriving, what a plain session gives.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use common::{Made, equals_a_plain_session, real_model};
use faaswap_engine::await_copies;
use faaswap_protocol::DType::{F32, I32, I64};

fn agrees(name: &str, inputs: &[Made]) {
    let manifest = equals_a_plain_session(&real_model(name), inputs);
    println!(
        "{name}: {} weights, {} groups, {} awaits, before run {:?}, trial {:?} us, diff {:?}",
        manifest.weights_bytes,
        manifest.groups.len(),
        manifest.await_count,
        manifest.await_before_run,
        manifest.trial_run_us,
        manifest.trial_max_abs_diff
    );
    assert!(manifest.await_before_run.is_none(), "every weight of this model can be awaited by a node");
    assert_eq!(await_copies(), 0, "an Await hands its input on without copying");
}

#[test]
fn text_detection_agrees() {
    agrees("ch_PP-OCRv4_det_infer.onnx", &[Made::new(F32, &[1, 3, 96, 160], 1)]);
}

#[test]
fn text_recognition_agrees() {
    agrees("ch_PP-OCRv4_rec_infer.onnx", &[Made::new(F32, &[1, 3, 48, 160], 2)]);
}

#[test]
fn text_direction_agrees() {
    agrees("ch_ppocr_mobile_v2.0_cls_infer.onnx", &[Made::new(F32, &[1, 3, 48, 192], 3)]);
}

#[test]
fn file_type_agrees() {
    agrees("magika.onnx", &[Made::new(I32, &[1, 2048], 4)]);
}

#[test]
fn pitch_detection_agrees() {
    agrees("nmp.onnx", &[Made::new(F32, &[1, 43844, 1], 5)]);
}

fn rate(rate: i64) -> Made {
    Made::from_bytes(I64, &[], &rate.to_le_bytes())
}

#[test]
fn voice_detection_with_branches_agrees_in_both_branches() {
    let state = Made::new(F32, &[2, 1, 128], 7);
    let (second, half) = (Made::new(F32, &[1, 576], 6), Made::new(F32, &[1, 288], 6));
    agrees("silero_vad.onnx", &[second.clone(), state.clone(), rate(16000)]);
    agrees("silero_vad.onnx", &[half.clone(), state.clone(), rate(8000)]);
    agrees("silero_vad_op18_ifless.onnx", &[second, rate(16000), state.clone()]);
    agrees("silero_vad_op18_ifless.onnx", &[half, rate(8000), state]);
}

#[test]
fn voice_detection_at_one_rate_agrees() {
    let (sound, state) = (Made::new(F32, &[1, 576], 8), Made::new(F32, &[2, 1, 128], 9));
    agrees("silero_vad_16k_op15.onnx", &[sound.clone(), state.clone(), rate(16000)]);
    agrees("silero_vad_half.onnx", &[sound.clone(), state.clone()]);
    agrees("silero_vad_openvino_16k.onnx", &[sound, state]);
}

#[test]
fn voice_detection_over_a_sequence_agrees() {
    let state = |seed| Made::new(F32, &[1, 1, 128], seed);
    agrees("silero_vad_16k_sequence.onnx", &[Made::new(F32, &[5, 576], 10), state(11), state(12)]);
}
