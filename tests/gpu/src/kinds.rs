//! Models bound by their kind, without a session: how long that takes, and whether they answer as when they have one.
//!
//! Each model has variants here whose weights and small constants are their own. On one GPU there are two devices: one binds all
//! by sessions, the other one by their kind, which it learns from the first. What both answer must be the same, bit for bit.

use std::{fs, path::Path, sync::Arc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_engine::{
    Prepared,
    manifest::{Initializer, MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE},
    onnx::{ModelProto, TensorProto},
};
use faaswap_protocol::Bytes;
use prost::Message;
use serde_json::json;

use crate::{
    Result, many,
    model::{self, Asked},
    node, prepared,
    record::{Record, Records, Target},
    stats::median,
};

/// Of each model.
const VARIANTS: u64 = 6;
/// Smaller constants are left as they are, if they are no vectors: they may be about shapes, and are of the kind.
const ELEMENTS_MIN: i64 = 16;
/// Device memory beside the weights.
const SPARE: Bytes = Bytes::mib(64);

pub(crate) fn run(models: &Path, out: &Path) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = prepared::all(models)?;
    let (mut records, mut told, mut all_wrong) = (Vec::new(), Vec::new(), 0);
    println!("model                  by session ms  by kind ms  first ms  twins  wrong");
    for (name, prepared) in prepared {
        let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + SPARE.get()));
        let open = |twins| -> Result<Arc<dyn Device>> {
            Ok(CudaDevice::open(&CudaConfig { memory, lanes: 2, twins, ..model::config(0)? })?)
        };
        let (apart, together) = (open(false)?, open(true)?);
        let folder = tempfile::tempdir()?;
        let (mut by_session, mut by_kind, mut twins, mut wrong) = (Vec::new(), Vec::new(), 0_u64, 0_u64);
        let (mut kept, mut learnt_ms) = (Vec::new(), 0.0);
        for number in 0..VARIANTS {
            let variant = variant(&prepared, number, folder.path())?;
            let bind = |device: &Arc<dyn Device>| -> Result<(Asked, f64)> {
                let start = Instant::now();
                let asked = Asked::new(&runtime, &variant, device)?;
                Ok((asked, start.elapsed().as_secs_f64() * 1e3))
            };
            let ((one, one_ms), (other, other_ms)) = (bind(&apart)?, bind(&together)?);
            let answer = |asked: &Asked| -> Result<Vec<u8>> {
                asked.swap_in()?;
                let first = asked.ask()?;
                let again = asked.ask()?;
                asked.swap_out()?;
                Ok(if first == again { first } else { Vec::new() })
            };
            let (expected, answered) = (answer(&one)?, answer(&other)?);
            if number == 0 {
                learnt_ms = other_ms;
            }
            let seen_before = kept.iter().any(|(_, before): &(Asked, Vec<u8>)| *before == answered);
            wrong += u64::from(expected != answered || answered.is_empty() || seen_before);
            if other.bound.is_twin() {
                twins += 1;
                by_session.push(one_ms);
                by_kind.push(other_ms);
            }
            kept.push((other, answered));
        }
        // What came later must not have changed those before.
        for (asked, answered) in &kept {
            asked.swap_in()?;
            wrong += u64::from(asked.ask()? != *answered);
            asked.swap_out()?;
        }
        // What all of the kind have together: graphs, and a session where their kernels go with it.
        let cuda = together.as_cuda().ok_or("no GPU")?;
        let gpu = cuda.gpu_name()?;
        let before = cuda.driver_memory()?.0;
        drop(kept);
        let freed_mb = (cuda.driver_memory()?.0.get() as f64 - before.get() as f64) / 1e6;
        let (kept_session, kernels_go) = (prepared.manifest().keep_session.is_some(), prepared.manifest().kernels_go);
        if twins == 0 {
            let why = prepared.manifest().keep_session.as_ref().or(prepared.manifest().bind_apart.as_ref());
            let why = why.map_or("their kinds are not the same, or were not learnt", String::as_str);
            println!("{name:20} none is bound by its kind: {why}");
        } else {
            let (session, kind) = (median(&mut by_session), median(&mut by_kind));
            println!(
                "{name:20} {session:15.1} {kind:11.1} {learnt_ms:9.1} {twins:6} {wrong:6}  kernels go: {kernels_go}, {freed_mb:.1} MB"
            );
            let record = Record::of("bind_by_kind", &name, (kind, "ms"), Some((session, "by a session")), Target::Told);
            records.push(record.counting(2 * VARIANTS, wrong));
        }
        all_wrong += wrong;
        told.push(json!({"model": name, "twins": twins, "of": VARIANTS - 1, "kept_session": kept_session,
                   "kernels_go": kernels_go, "freed_mb": freed_mb, "wrong": wrong}));
        Records::new(out, "kinds", gpu)?.add(&records)?;
        fs::write(out.join("kinds.json"), serde_json::to_vec_pretty(&told)?)?;
    }
    if all_wrong > 0 { Err(format!("{all_wrong} answers are wrong").into()) } else { Ok(()) }
}

/// The model with weights and small constants of its own; 0 is the model itself.
fn variant(prepared: &Prepared, number: u64, folder: &Path) -> Result<Prepared> {
    let dir = folder.join(number.to_string());
    fs::create_dir_all(&dir)?;
    let mut graph = ModelProto::decode(&fs::read(prepared.graph_path())?[..])?;
    let tensors = graph.graph.iter_mut().flat_map(|graph| &mut graph.initializer).enumerate();
    let is_own = |tensor: &TensorProto| {
        let elements = tensor.dims.iter().product::<i64>();
        elements >= ELEMENTS_MIN || tensor.dims.len() == 1 && elements > 1
    };
    for (at, tensor) in tensors.filter(|(_, tensor)| number > 0 && is_own(tensor)) {
        let Some(raw) = &tensor.raw_data else { continue };
        let (mut raw, len) = (raw.to_vec(), raw.len() as u64);
        let (name, element, dims) = (tensor.name().to_owned(), tensor.data_type(), tensor.dims.clone());
        let pattern = number << u32::BITS | at as u64;
        node::turn(&mut raw, 0, &[Initializer { name, element, dims, offset: 0, len }], pattern)?;
        tensor.raw_data = Some(raw.into());
    }
    fs::write(dir.join(MODEL_FILE), graph.encode_to_vec())?;
    fs::copy(prepared.graph_path().with_file_name(MANIFEST_FILE), dir.join(MANIFEST_FILE))?;
    fs::write(dir.join(WEIGHTS_FILE), many::variant(prepared, number)?.as_slice())?;
    Ok(Prepared::open(&dir)?)
}
