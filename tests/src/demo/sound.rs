//! Sounds made up from what is known of them, and what the models hear in them: a voice's vowels, a melody's notes.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "samples and times in seconds: small numbers, and audio has 16 bits at most"
)]

use std::{f64::consts::TAU, fs, path::Path};

use super::functions::Case;
use crate::{Result, Trouble, oip::Tensor, random::Random};

/// The voice model's sampling rate, the samples of one window, and how many samples before it a window repeats.
const VOICE_RATE: u32 = 16_000;
pub const VOICE_WINDOW: usize = 512;
const VOICE_CONTEXT: usize = 64;
/// Size of the voice model's memory between windows.
const VOICE_STATE: [u64; 3] = [2, 1, 128];
/// The note model's sampling rate, window, and silence before the first.
const NOTE_RATE: u32 = 22_050;
const NOTE_WINDOW: usize = 43_844;
const NOTE_LEAD: usize = 30 * 256 / 2;
/// Frames in a second of the note model's answer, its lowest note in MIDI's numbers, and how many notes it knows.
const FRAMES_PER_S: f32 = 86.0;
const NOTE_LOWEST: usize = 21;
const NOTES: usize = 88;
/// Scores from which a note begins, and goes on.
const ONSET_MIN: f32 = 0.5;
const FRAME_MIN: f32 = 0.3;

/// When the voice speaks, in seconds.
pub const SPOKEN: (f64, f64) = (0.5, 2.0);
/// The melody, in MIDI's numbers, and how long each note sounds.
pub const MELODY: [u8; 8] = [60, 64, 67, 72, 67, 64, 62, 60];
const NOTE_S: f64 = 0.4;

fn samples(seconds: f64, rate: u32) -> usize {
    (seconds * f64::from(rate)) as usize
}

/// A resonance of the mouth: a two-pole filter at this frequency, so wide.
fn resonate(sound: &mut [f64], frequency: f64, width: f64) {
    let rate = f64::from(VOICE_RATE);
    let radius = (-std::f64::consts::PI * width / rate).exp();
    let (a1, a2) = (2.0 * radius * (TAU * frequency / rate).cos(), -radius * radius);
    let (mut last, mut before) = (0.0, 0.0);
    for sample in sound {
        let next = (1.0 - a1 - a2) * *sample + a1 * last + a2 * before;
        (before, last) = (last, next);
        *sample = next;
    }
}

/// A voice that says vowels for a while, with silence before and after.
pub fn voice() -> Vec<f32> {
    // The first four resonances of a, i, o, e and u as men speak them.
    const VOWELS: [[f64; 4]; 5] = [
        [730.0, 1090.0, 2440.0, 3400.0],
        [270.0, 2290.0, 3010.0, 3600.0],
        [570.0, 840.0, 2410.0, 3300.0],
        [530.0, 1840.0, 2480.0, 3500.0],
        [300.0, 870.0, 2240.0, 3300.0],
    ];
    const WIDTHS: [f64; 4] = [75.0, 90.0, 130.0, 200.0];
    const VOWEL_S: f64 = 0.16;
    const PAUSE_S: f64 = 0.05;
    let mut random = Random::new(7);
    let mut sound = vec![0.0; samples(SPOKEN.0, VOICE_RATE)];
    for vowel in 0.. {
        if sound.len() >= samples(SPOKEN.1, VOICE_RATE) {
            break;
        }
        let len = samples(VOWEL_S, VOICE_RATE);
        let mut phase = 0.0_f64;
        let mut spoken: Vec<f64> = (0..len)
            .map(|i| {
                // One pulse per opening of the vocal cords, its pitch falling.
                let pitch = 140.0 - 25.0 * i as f64 / len as f64;
                let before = phase.floor();
                phase += pitch / f64::from(VOICE_RATE);
                phase.floor() - before + 0.003 * f64::from(random.signed())
            })
            .collect();
        for (frequency, width) in VOWELS[vowel % VOWELS.len()].iter().zip(WIDTHS) {
            resonate(&mut spoken, *frequency, width);
        }
        let fade = |i: usize| (8.0 * i as f64 / len as f64).min(8.0 * (len - i) as f64 / len as f64).min(1.0);
        sound.extend(spoken.iter().enumerate().map(|(i, sample)| sample * fade(i)));
        sound.extend((0..samples(PAUSE_S, VOICE_RATE)).map(|_| 0.01 * f64::from(random.signed())));
    }
    sound.extend(vec![0.0; samples(0.5, VOICE_RATE)]);
    let loudest = sound.iter().fold(f64::MIN_POSITIVE, |loudest, sample| loudest.max(sample.abs()));
    sound.iter().map(|sample| (0.5 * sample / loudest) as f32).collect()
}

/// The inputs for one window of the voice, after the model has answered `state` to the one before.
pub fn voice_inputs(sound: &[f32], window: usize, state: Option<&Tensor>) -> Vec<Tensor> {
    let start = window * VOICE_WINDOW;
    let mut samples = vec![0.0; VOICE_CONTEXT.saturating_sub(start)];
    samples.extend_from_slice(&sound[start.saturating_sub(VOICE_CONTEXT)..start + VOICE_WINDOW]);
    let len = (VOICE_CONTEXT + VOICE_WINDOW) as u64;
    let silent = || Tensor::f32("state", &VOICE_STATE, &[0.0; 256]);
    let state = state.map_or_else(silent, |state| Tensor { name: "state".to_owned(), ..state.clone() });
    vec![Tensor::f32("input", &[1, len], &samples), state, Tensor::i64_scalar("sr", i64::from(VOICE_RATE))]
}

/// When a window begins.
pub fn voice_time(window: usize) -> f64 {
    (window * VOICE_WINDOW) as f64 / f64::from(VOICE_RATE)
}

/// Plucked strings: a few harmonics that die away.
pub fn melody() -> Vec<f32> {
    let len = samples(NOTE_S, NOTE_RATE);
    let note = |note: &u8| {
        let frequency = 440.0 * 2_f64.powf((f64::from(*note) - 69.0) / 12.0);
        (0..len).map(move |i| {
            let t = i as f64 / f64::from(NOTE_RATE);
            let harmonics = (1..=5).map(|k| (TAU * frequency * f64::from(k) * t).sin() / f64::from(k * k));
            let attack = (t * 200.0).min(1.0);
            (0.4 * attack * (-3.0 * t).exp() * harmonics.sum::<f64>()) as f32
        })
    };
    MELODY.iter().flat_map(note).collect()
}

/// Requests that ask for the notes in each window of a sound.
pub fn note_cases(sound: &[f32]) -> Vec<Case> {
    let mut sound: Vec<f32> = std::iter::repeat_n(0.0, NOTE_LEAD).chain(sound.iter().copied()).collect();
    let hop = NOTE_WINDOW - 2 * NOTE_LEAD;
    sound.resize(sound.len().next_multiple_of(hop) + NOTE_WINDOW - hop, 0.0);
    let windows = sound.windows(NOTE_WINDOW).step_by(hop).enumerate();
    let cases = windows.map(|(number, window)| {
        let from = (number * hop) as f64 / f64::from(NOTE_RATE);
        let label = format!("from {from:.1} s");
        let input = Tensor::f32("serving_default_input_2:0", &[1, NOTE_WINDOW as u64, 1], window);
        Case { label, inputs: vec![input] }
    });
    cases.collect()
}

/// The notes that begin in a window, by name, with the time when they begin.
pub fn notes(frames: &[f32], onsets: &[f32]) -> String {
    let mut heard = Vec::new();
    let rows: Vec<(&[f32], &[f32])> = onsets.chunks_exact(NOTES).zip(frames.chunks_exact(NOTES)).collect();
    let lead = NOTE_LEAD / 256;
    for (frame, three) in rows.windows(3).enumerate().skip(lead - 1).take(rows.len().saturating_sub(2 * lead)) {
        for note in 0..NOTES {
            let [before, now, after] = [0, 1, 2].map(|at| three[at].0[note]);
            let sounds = three[2].1[note] >= FRAME_MIN;
            if now >= ONSET_MIN && now > before && now >= after && sounds {
                heard.push(format!(
                    "{} at {:.2} s",
                    name(note + NOTE_LOWEST),
                    (frame + 1 - lead) as f32 / FRAMES_PER_S
                ));
            }
        }
    }
    if heard.is_empty() { "silence".to_owned() } else { heard.join(", ") }
}

fn name(midi: usize) -> String {
    const NAMES: [&str; 12] = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"];
    format!("{}{}", NAMES[midi % 12], (midi / 12).saturating_sub(1))
}

/// Writes a sound as a WAV file with 16 bits per sample.
pub fn save_wav(path: &Path, sound: &[f32]) -> Result<()> {
    let len = u32::try_from(sound.len() * 2)?;
    let mut file = Vec::with_capacity(44 + sound.len() * 2);
    file.extend_from_slice(b"RIFF");
    file.extend_from_slice(&(36 + len).to_le_bytes());
    file.extend_from_slice(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend_from_slice(&NOTE_RATE.to_le_bytes());
    file.extend_from_slice(&(NOTE_RATE * 2).to_le_bytes());
    file.extend_from_slice(b"\x02\0\x10\0data");
    file.extend_from_slice(&len.to_le_bytes());
    file.extend(sound.iter().flat_map(|sample| ((sample * 32_767.0) as i16).to_le_bytes()));
    fs::write(path, file).map_err(Trouble::while_doing(path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_repeat_the_samples_before_them() {
        let sound: Vec<f32> = (0..2048_u16).map(f32::from).collect();
        let first = voice_inputs(&sound, 0, None);
        let second = voice_inputs(&sound, 1, Some(&first[1]));
        assert_eq!(first[0].floats()[..65], [[0.0; 64].as_slice(), &[0.0]].concat());
        assert_eq!(second[0].floats()[0], 448.0);
        assert_eq!(second[0].floats()[64], 512.0);
        assert_eq!(second[0].shape, [1, 576]);
    }

    #[test]
    fn an_onset_is_a_peak_that_keeps_sounding() {
        let mut onsets = vec![0.0; 172 * NOTES];
        let mut frames = vec![0.0; 172 * NOTES];
        for (frame, score) in [(100, 0.4), (101, 0.9), (102, 0.6)] {
            onsets[frame * NOTES + 39] = score;
            onsets[frame * NOTES + 50] = score;
        }
        (101..130).for_each(|frame| frames[frame * NOTES + 39] = 0.8);
        assert_eq!(notes(&frames, &onsets), "C4 at 1.00 s");
    }
}
