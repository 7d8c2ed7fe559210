//! Finds out where the parts of prepared weights come from: by changing every weight of the model that they were
//! prepared from, and looking where the changes are afterwards.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use bytes::Bytes as Buffer;
use faaswap_protocol::{Bytes, DType};
use prost::Message;

use super::{
    super::{PrepareJob, for_gpu, inspect, joined, optimize, rewrite},
    Kin, Recipe,
    original::{Original, is_weight, strip},
    parts::{self, Part},
};
use crate::{
    EngineError, Manifest, PrepareError, Prepared, Runtime, await_op,
    manifest::MODEL_FILE,
    onnx::{self, GraphProto, ModelProto},
};

const CHANGED_GRAPH: &str = "changed.onnx";
const CHANGED_DATA: &str = "changed.bin";

/// One part as it was prepared, and as it is prepared from changed weights.
struct Pair<'a> {
    name: &'a str,
    dims: &'a [i64],
    before: Buffer,
    after: Buffer,
}

/// Optimizes the first model of a kind once more, with other weights.
pub(super) fn learn(
    runtime: &Runtime,
    kin: &Kin,
    prepared: &Prepared,
    group_bytes: Bytes,
    work: &Path,
) -> Result<Recipe, PrepareError> {
    let original = Original::open(&kin.model_dir, &kin.graph_file)?;
    write_changed(&original, work)?;
    let (target, out_dir) = (prepared.manifest().target, work.join("out"));
    fs::create_dir_all(&out_dir).map_err(EngineError::io(&out_dir))?;
    let optimized = optimize::optimize(runtime, target, &work.join(CHANGED_GRAPH), work)?;
    drop(optimized.session);
    let job = PrepareJob {
        model_dir: work.to_owned(),
        graph_file: CHANGED_GRAPH.to_owned(),
        out_dir: out_dir.clone(),
        group_bytes,
        target,
    };
    let signature = inspect::judge(work, &original_of(work)?)?;
    let mut model = inspect::read_model(&optimized.graph)?;
    if prepared.manifest().fused_attention + prepared.manifest().joined_products > 0 {
        model = for_gpu(&model, target, work)?.unwrap_or(model);
    }
    let changed = rewrite(model, runtime, &job, &signature, work)?;
    same_tables(prepared.manifest(), &changed)?;
    let before = inspect::read_model(&prepared.graph_path())?;
    let after = inspect::read_model(&out_dir.join(MODEL_FILE))?;
    if shape(&before) != shape(&after) {
        return Err(PrepareError::rejected("its graph depends on the values of weights"));
    }
    let after_dir = Prepared::untried(&out_dir, changed)?;
    find_all(&original, prepared, (&before, &after), &after_dir)
}

fn original_of(work: &Path) -> Result<ModelProto, PrepareError> {
    inspect::read_model(&work.join(CHANGED_GRAPH))
}

/// The original with every weight changed, all data in one file beside the graph.
fn write_changed(original: &Original, work: &Path) -> Result<(), PrepareError> {
    let path = work.join(CHANGED_DATA);
    let mut file = File::create(&path).map_err(EngineError::io(&path))?;
    let (mut model, mut end) = (original.model.clone(), 0_u64);
    let graph = model.graph.get_or_insert_default();
    for (number, tensor) in graph.initializer.iter_mut().enumerate() {
        let is_external = matches!(tensor.external(), Ok(Some(_)));
        if !is_weight(tensor) && !is_external {
            continue;
        }
        let mut bytes = original.bytes(tensor)?.to_vec();
        if is_weight(tensor) {
            change(&mut bytes, tensor.data_type(), number);
        }
        file.write_all(&bytes).map_err(EngineError::io(&path))?;
        let len = bytes.len() as u64;
        tensor.set_external(CHANGED_DATA, end, len);
        end += len;
    }
    let path = work.join(CHANGED_GRAPH);
    Ok(fs::write(&path, model.encode_to_vec()).map_err(EngineError::io(&path))?)
}

/// Changes each float by less than a hundredth or so, in bits that follow from its place and from its tensor's.
fn change(bytes: &mut [u8], element: i32, tensor: usize) {
    // The lowest bits of the fraction that every format can spare, from the one of a hundredth downwards.
    let (width, shift, mask) = match onnx::dtype_of(element) {
        Some(DType::F32) => (4, 1, 0xFFFF_u64),
        Some(DType::F16) => (2, 0, 0xF),
        Some(DType::Bf16) => (2, 0, 0x1),
        Some(DType::F64) => (8, 30, 0xFFFF),
        Some(_) | None => return,
    };
    let mut state = (tensor as u64).wrapping_mul(0xA24B_AED4_963E_E407);
    for float in bytes.chunks_exact_mut(width) {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let turn = ((mixed >> 32) & mask) << shift;
        for (byte, turned) in float.iter_mut().zip(turn.to_le_bytes()) {
            *byte ^= turned;
        }
    }
}

fn same_tables(before: &Manifest, after: &Manifest) -> Result<(), PrepareError> {
    let same = before.initializers == after.initializers
        && before.groups == after.groups
        && before.signature == after.signature
        && (before.await_count, &before.await_types, before.await_before_run)
            == (after.await_count, &after.await_types, after.await_before_run)
        && before.inputs_in_place == after.inputs_in_place;
    if same { Ok(()) } else { Err(PrepareError::rejected("its tables depend on the values of weights")) }
}

/// A graph without the values of weights, in an order of its own. ONNX Runtime imports our operators, or does not, by what
/// it was told before.
fn shape(model: &ModelProto) -> Vec<u8> {
    let mut model = model.clone();
    model.opset_import.retain(|import| import.domain() != await_op::DOMAIN);
    model.opset_import.sort_by(|a, b| a.domain.cmp(&b.domain));
    let graph = model.graph.get_or_insert_default();
    graph.initializer.iter_mut().filter(|tensor| is_in_graph(tensor)).for_each(strip);
    graph.initializer.sort_by(|a, b| a.name.cmp(&b.name));
    graph.value_info.sort_by(|a, b| a.name.cmp(&b.name));
    model.encode_to_vec()
}

/// Weights that a prepared graph holds itself.
pub(super) fn is_in_graph(tensor: &onnx::TensorProto) -> bool {
    is_weight(tensor) && tensor.raw_data.is_some()
}

fn find_all(
    original: &Original,
    prepared: &Prepared,
    (before, after): (&ModelProto, &ModelProto),
    changed: &Prepared,
) -> Result<Recipe, PrepareError> {
    // Every original's weights before and after, read once.
    let mut sources = Vec::new();
    let places = original.model.graph.iter().flat_map(|graph| graph.initializer.iter().enumerate());
    for (number, tensor) in places.filter(|(_, tensor)| is_weight(tensor)) {
        sources.push(Source {
            name: tensor.name(),
            dims: &tensor.dims,
            element: tensor.data_type(),
            number,
            bytes: original.bytes(tensor)?,
        });
    }
    let (mut one, mut other) = (open(&prepared.weights_path())?, open(&changed.weights_path())?);
    let mut in_file = Vec::new();
    for weight in &prepared.manifest().initializers {
        let (before, after) =
            (read(&mut one, weight.offset, weight.len)?, read(&mut other, weight.offset, weight.len)?);
        in_file.push(find(&sources, &Pair { name: &weight.name, dims: &weight.dims, before, after })?);
    }
    let mut in_graph = Vec::new();
    let after: BTreeMap<_, _> = held(after).collect();
    for (name, (dims, before)) in held(before) {
        let after = after.get(name).map(|(_, after)| after.clone()).unwrap_or_default();
        in_graph.push((name.to_owned(), find(&sources, &Pair { name, dims, before, after })?));
    }
    Ok(Recipe::Parts { in_file, in_graph })
}

type Held<'a> = (&'a str, (&'a [i64], Buffer));

fn held(model: &ModelProto) -> impl Iterator<Item = Held<'_>> {
    let initializers = model.graph.iter().flat_map(|graph: &GraphProto| &graph.initializer);
    let held = initializers.filter(|tensor| is_in_graph(tensor));
    held.map(|tensor| (tensor.name(), (&tensor.dims[..], tensor.raw_data.clone().unwrap_or_default())))
}

fn open(path: &Path) -> Result<File, EngineError> {
    File::open(path).map_err(EngineError::io(path))
}

fn read(file: &mut File, offset: u64, len: u64) -> Result<Buffer, PrepareError> {
    let failed = |why: std::io::Error| PrepareError::rejected(format!("its prepared weights cannot be read: {why}"));
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    file.read_exact(&mut bytes).map_err(failed)?;
    Ok(Buffer::from(bytes))
}

/// An original's weights.
struct Source<'a> {
    name: &'a str,
    dims: &'a [i64],
    element: i32,
    number: usize,
    bytes: Buffer,
}

impl Source<'_> {
    fn gives(&self, order: Option<&[usize]>, pair: &Pair<'_>) -> bool {
        if self.bytes.len() != pair.before.len() || !parts::is_ordered(&self.bytes, self.dims, order, &pair.before) {
            return false;
        }
        let mut changed = self.bytes.to_vec();
        change(&mut changed, self.element, self.number);
        parts::is_ordered(&changed, self.dims, order, &pair.after)
    }

    fn part(&self, order: Option<&[usize]>) -> Part {
        let from = self.name.to_owned();
        order.map_or_else(
            || Part::Copied(from.clone()),
            |order| Part::Moved { from: from.clone(), order: order.to_vec() },
        )
    }
}

/// The origin of a part, or of each of those that were joined.
fn find(sources: &[Source<'_>], pair: &Pair<'_>) -> Result<Part, PrepareError> {
    let Some(count) = joined::parts_of(pair.name).filter(|_| pair.before != pair.after) else {
        return find_one(sources, pair);
    };
    let (rows, mut dims) = (joined::rows_of(pair.dims), pair.dims.to_vec());
    if let Some(last) = dims.last_mut() {
        *last /= i64::try_from(count).unwrap_or(i64::MAX);
    }
    let [before, after] = [&pair.before, &pair.after].map(|bytes| joined::apart(bytes, rows, count).into_iter());
    let parts = before.zip(after).map(|(before, after)| {
        find_one(sources, &Pair { name: pair.name, dims: &dims, before: before.into(), after: after.into() })
    });
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    match parts.contains(&Part::Kept) {
        true => Err(PrepareError::rejected(format!("{} is in part the same for all models", pair.name))),
        false => Ok(Part::Joined { rows, parts }),
    }
}

/// The only origin of a part; one of the same name goes before others.
fn find_one(sources: &[Source<'_>], pair: &Pair<'_>) -> Result<Part, PrepareError> {
    if pair.before == pair.after {
        return Ok(Part::Kept);
    }
    let ways = |source: &Source<'_>| -> Vec<Option<&'static [usize]>> {
        std::iter::once(None).chain(parts::orders(source.dims, pair.dims).map(Some)).collect()
    };
    let all =
        |source| ways(source).into_iter().filter(|order| source.gives(*order, pair)).map(|order| source.part(order));
    let own = sources.iter().filter(|source| source.name == pair.name).find_map(|source| all(source).next());
    if let Some(own) = own {
        return Ok(own);
    }
    let mut found = sources.iter().flat_map(|source| all(source).next());
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(PrepareError::rejected(format!("{} is computed from weights", pair.name))),
        (Some(_), Some(_)) => {
            Err(PrepareError::rejected(format!("{} may come from more than one of the weights", pair.name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_the_matrices_that_were_joined_is_found() {
        let dims = [3, 4];
        let bytes = |seed: u8| -> Buffer {
            (0..48).map(|at| seed.wrapping_mul(31).wrapping_add(at)).collect::<Vec<_>>().into()
        };
        let source = |name, number| Source {
            name,
            dims: &dims,
            element: 1,
            number,
            bytes: bytes(u8::try_from(number).expect("small")),
        };
        let sources = [source("a", 1), source("b", 2), source("c", 3)];
        let joined_of = |changed: [bool; 2]| {
            let parts = [2, 0].iter().zip(changed).map(|(&at, is_changed)| {
                let mut bytes = sources[at].bytes.to_vec();
                if is_changed {
                    change(&mut bytes, 1, sources[at].number);
                }
                bytes
            });
            Buffer::from(joined::beside(&parts.collect::<Vec<_>>(), 3))
        };
        let found = |after| {
            let (before, after) = (joined_of([false; 2]), joined_of(after));
            find(&sources, &Pair { name: "faaswap/joined/2/c", dims: &[3, 8], before, after })
        };
        let parts = ["c", "a"].map(|name| Part::Copied(name.to_owned())).to_vec();
        assert_eq!(found([true; 2]).expect("all are there"), Part::Joined { rows: 3, parts });
        assert_eq!(found([false; 2]).expect("nothing has changed"), Part::Kept);
        assert!(found([true, false]).is_err());
    }
}
