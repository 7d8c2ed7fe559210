//! Which functions the demo deploys, what they are asked, and what a plain ONNX Runtime session answers to that.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use faaswap_engine::{Input, InputData, PlainSession, Runtime};
use faaswap_protocol::Shape;

use super::{
    files,
    image::Grey,
    sound, text,
    variant::{self, Port},
};
use crate::{
    Result, Trouble, cache, models,
    oip::{Request, Tensor},
};

/// One thing that a function can be asked.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is about.
    pub label: String,
    /// Its inputs, in the model's order.
    pub inputs: Vec<Tensor>,
}

/// What a function is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Tells a file's type.
    FileType,
    /// Finds text in an image.
    FindText,
    /// Tells which way up a line of text is.
    TurnText,
    /// Reads a line of text.
    ReadText,
    /// Tells whether a window of sound is speech.
    Speech,
    /// Hears the notes in a window of sound.
    Notes,
}

/// How one task is deployed.
struct Design {
    task: Task,
    name: &'static str,
    model: &'static str,
    copies: u64,
    slo_ms: u64,
    /// Requests in a burst, on average.
    burst: f64,
}

/// Sixteen functions; each copy has weights of its own.
const DESIGNS: [Design; 6] = [
    Design { task: Task::FileType, name: "file-type", model: "magika.onnx", copies: 3, slo_ms: 300, burst: 8.0 },
    Design {
        task: Task::FindText,
        name: "find-text",
        model: "ch_PP-OCRv4_det_infer.onnx",
        copies: 3,
        slo_ms: 1500,
        burst: 2.0,
    },
    Design {
        task: Task::TurnText,
        name: "turn-text",
        model: "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        copies: 2,
        slo_ms: 300,
        burst: 6.0,
    },
    Design {
        task: Task::ReadText,
        name: "read-text",
        model: "ch_PP-OCRv4_rec_infer.onnx",
        copies: 4,
        slo_ms: 600,
        burst: 4.0,
    },
    Design { task: Task::Speech, name: "speech", model: "silero_vad.onnx", copies: 2, slo_ms: 250, burst: 10.0 },
    Design { task: Task::Notes, name: "notes", model: "nmp.onnx", copies: 2, slo_ms: 500, burst: 4.0 },
];

/// A function before it is deployed.
#[derive(Debug)]
pub struct Plan {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub task: Task,
    /// Its own model file.
    pub model: PathBuf,
    /// Its deadline.
    pub slo: Duration,
    /// Requests in a burst, on average.
    pub burst: f64,
}

/// Writes each function's model; the first copy of each is the original.
pub fn plan(folder: &Path) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for Design { task, name, model, copies, slo_ms, burst } in DESIGNS {
        let original = variant::read(&cache::model(model)?)?;
        for copy in 0..copies {
            let mut mine = original.clone();
            if copy > 0 {
                variant::vary(&mut mine, copy);
            }
            let name = format!("{name}-{}", copy + 1);
            let path = folder.join(format!("{name}.onnx"));
            models::write(&mine, &path)?;
            plans.push(Plan { name, task, model: path, slo: Duration::from_millis(slo_ms), burst });
        }
    }
    Ok(plans)
}

/// What must be known to make requests and to read answers.
#[derive(Debug)]
pub struct Knowledge {
    magika: files::Config,
    alphabet: Vec<String>,
    page: Grey,
    areas: Vec<text::Area>,
    melody: Vec<f32>,
    files: Vec<PathBuf>,
    voice: Vec<f32>,
}

impl Knowledge {
    /// Draws, sings and looks around. What it makes is left in the folder for people to look at.
    pub fn gather(runtime: &Runtime, folder: &Path) -> Result<Self> {
        let page = text::image()?;
        let melody = sound::melody();
        let (png, wav) = (folder.join("text.png"), folder.join("melody.wav"));
        page.save(&png)?;
        sound::save_wav(&wav, &melody)?;
        // Where the lines are is the detector's to say; a plain session of it makes the requests for the readers.
        let detector = Plain::open(runtime, &cache::model("ch_PP-OCRv4_det_infer.onnx")?)?;
        let whole = text::find_cases(&page)?.swap_remove(0);
        let areas = text::boxes(&one(&detector.run(&whole.inputs)?)?.floats(), page.width, page.height);
        if areas.len() != text::LINES.len() {
            return Err(Trouble::new(format!("{} lines are drawn, {} are found", text::LINES.len(), areas.len())));
        }
        let ours = ["Cargo.toml", "Makefile", "ARCHITECTURE.md", "tests/src/http.rs", "tests/tools/fetch"];
        let files = ours.iter().map(|name| cache::root().join(name));
        let files = files.chain([png, wav, cache::font()?, cache::onnxruntime()?, cache::model("nmp.onnx")?]).collect();
        let alphabet = text::alphabet(&variant::read(&cache::model("ch_PP-OCRv4_rec_infer.onnx")?)?)?;
        Ok(Self { magika: files::Config::load()?, alphabet, page, areas, melody, files, voice: sound::voice() })
    }

    /// What an answer says to people.
    pub fn explain(&self, task: Task, outputs: &[Tensor]) -> Result<String> {
        let named = |name: &str| {
            let found = outputs.iter().find(|output| output.name == name).map(Tensor::floats);
            found.ok_or_else(|| Trouble::new(format!("the answer has no output {name}")))
        };
        Ok(match task {
            Task::FileType => self.magika.verdict(&one(outputs)?.floats()),
            Task::FindText => {
                let output = one(outputs)?;
                let side = |at: usize| usize::try_from(output.shape.get(at).copied().unwrap_or(0)).unwrap_or(0);
                let found = text::boxes(&output.floats(), side(3), side(2));
                let shown = found.iter().map(|(left, top, right, bottom)| format!("{left},{top} to {right},{bottom}"));
                format!("{} lines: {}", found.len(), shown.collect::<Vec<_>>().join("; "))
            }
            Task::TurnText => text::direction(&one(outputs)?.floats()),
            Task::ReadText => format!("\"{}\"", text::decode(&one(outputs)?.floats(), &self.alphabet)),
            Task::Speech => match named("output")?.first() {
                Some(score) if *score >= 0.5 => format!("speech ({score:.2})"),
                Some(score) => format!("no speech ({score:.2})"),
                None => "nothing".to_owned(),
            },
            Task::Notes => sound::notes(&named("StatefulPartitionedCall:1")?, &named("StatefulPartitionedCall:2")?),
        })
    }

    fn cases(&self, task: Task, plain: &Plain) -> Result<Vec<Case>> {
        match task {
            Task::FileType => files::cases(&self.files.iter().map(PathBuf::as_path).collect::<Vec<_>>()),
            Task::FindText => text::find_cases(&self.page),
            Task::TurnText => text::turn_cases(&self.page, &self.areas),
            Task::ReadText => text::read_cases(&self.page, &self.areas),
            Task::Speech => self.speech_cases(plain),
            Task::Notes => Ok(sound::note_cases(&self.melody)),
        }
    }

    /// Each window carries the state that the model answered to the one before.
    fn speech_cases(&self, plain: &Plain) -> Result<Vec<Case>> {
        let mut state = None;
        let windows = 0..self.voice.len() / sound::VOICE_WINDOW;
        let cases = windows.map(|window| {
            let inputs = sound::voice_inputs(&self.voice, window, state.as_ref());
            state = plain.run(&inputs)?.into_iter().find(|output| output.name == "stateN");
            Ok(Case { label: format!("at {:.2} s", sound::voice_time(window)), inputs })
        });
        cases.collect()
    }
}

fn one(outputs: &[Tensor]) -> Result<&Tensor> {
    outputs.first().ok_or_else(|| Trouble::new("the answer has no output"))
}

/// A plain ONNX Runtime session, with names. It does not prepack weights, which would change last bits.
#[derive(Debug)]
pub struct Plain {
    session: PlainSession,
    outputs: Vec<Port>,
}

impl Plain {
    /// Opens a model.
    pub fn open(runtime: &Runtime, model: &Path) -> Result<Self> {
        let outputs = variant::outputs(&variant::read(model)?)?;
        Ok(Self { session: PlainSession::open(runtime, model, false)?, outputs })
    }

    /// Runs it; inputs in the model's order.
    pub fn run(&self, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let shapes = inputs
            .iter()
            .map(|tensor| Shape::new(tensor.shape.as_slice()))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let inputs = inputs.iter().zip(&shapes);
        let inputs = inputs.map(|(t, shape)| Input { dtype: t.dtype, shape, data: InputData::Bytes(&t.data) });
        let outputs = self.session.run(&inputs.collect::<Vec<_>>())?;
        let named = outputs.into_iter().zip(&self.outputs).map(|((shape, data), (name, dtype))| Tensor {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.dims().to_vec(),
            data,
        });
        Ok(named.collect())
    }
}

/// A request with the answer that it must get.
#[derive(Debug)]
pub struct Exam {
    /// What it is about.
    pub label: String,
    /// The request.
    pub request: Request,
    /// What a plain session answers.
    pub expected: Vec<Tensor>,
}

/// The exams of a function, and how long a plain session takes for one on average.
pub fn exams(runtime: &Runtime, knowledge: &Knowledge, plan: &Plan) -> Result<(Vec<Exam>, Duration)> {
    let plain = Plain::open(runtime, &plan.model)?;
    let cases = knowledge.cases(plan.task, &plain)?;
    let mut exams = Vec::with_capacity(cases.len());
    let mut took = Duration::ZERO;
    for Case { label, inputs } in cases {
        let start = Instant::now();
        let expected = plain.run(&inputs)?;
        took += start.elapsed();
        exams.push(Exam { label, request: Request::new(&plan.name, &inputs)?, expected });
    }
    let count = u32::try_from(exams.len())?.max(1);
    Ok((exams, took / count))
}

/// What is wrong with an answer; `None` where every bit is right.
pub fn compare(expected: &[Tensor], outputs: &[Tensor]) -> Option<String> {
    if expected.len() != outputs.len() {
        return Some(format!("{} outputs came, {} were expected", outputs.len(), expected.len()));
    }
    expected.iter().find_map(|want| match outputs.iter().find(|have| have.name == want.name) {
        None => Some(format!("output {} is missing", want.name)),
        Some(have) if have == want => None,
        Some(have) if (have.dtype, &have.shape) != (want.dtype, &want.shape) => {
            Some(format!("{} is {} {:?}, not {} {:?}", want.name, have.dtype, have.shape, want.dtype, want.shape))
        }
        Some(have) => {
            let pairs = have.floats().into_iter().zip(want.floats());
            let differ = pairs.clone().filter(|(have, want)| have.to_bits() != want.to_bits()).count();
            let most = pairs.map(|(have, want)| (have - want).abs()).fold(0.0, f32::max);
            Some(format!("{}: {differ} of {} values differ, by {most} at most", want.name, want.floats().len()))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_bit_is_a_wrong_answer() {
        let expected = [Tensor::f32("a", &[2], &[1.0, 0.0]), Tensor::i32("b", &[1], &[7])];
        let with = |change: fn(&mut Vec<Tensor>)| {
            let mut outputs = expected.to_vec();
            change(&mut outputs);
            compare(&expected, &outputs)
        };
        assert_eq!(with(|_| {}), None);
        assert_eq!(with(|outputs| outputs.reverse()), None, "outputs are found by name");
        assert!(with(|outputs| outputs[0].data[7] = 0x80).is_some(), "minus zero is not zero");
        assert!(with(|outputs| outputs[1].data[0] ^= 1).is_some());
        assert!(with(|outputs| outputs[0].shape = vec![2, 1]).is_some());
        assert!(with(|outputs| outputs[1].name = "c".to_owned()).is_some());
        assert!(with(|outputs| drop(outputs.pop())).is_some());
    }
}
