//! Moves the large initializers of an optimized graph into one flat file, in order of first use by a run.
//!
//! Initializers of bodies (branches, loops) are hoisted into the main graph first, because only the main graph's can be
//! supplied from outside. What stays in the graph: small ones, text, and those that a graph hands out as its output.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
};

use bytes::Bytes as Buffer;

use super::{head, order};
use crate::{
    EngineError, PrepareError,
    limits::{WEIGHT_ALIGN, WEIGHT_BYTES_MIN},
    manifest::{Initializer, WEIGHTS_FILE},
    onnx::{self, GraphProto, NodeProto, TensorProto},
};

/// Writes `weights.bin` into `out` and leaves references to it in the graph. On a GPU integers stay in the graph (they are
/// few, and nodes that compute shapes read them on the host), and the head. Returns the table and the file's size.
pub(super) fn extract(
    graph: &mut GraphProto,
    data_dir: &Path,
    out: &Path,
    on_gpu: bool,
) -> Result<(Vec<Initializer>, u64), PrepareError> {
    // An input with a default value counts as a constant: requests cannot name it.
    let given: HashSet<String> = graph.initializer.iter().map(|tensor| tensor.name().to_owned()).collect();
    graph.input.retain(|input| !given.contains(input.name()));
    hoist(graph);
    let handed_out: HashSet<&str> = graph.output.iter().map(|value| value.name()).collect();
    let mut late: HashMap<String, usize> = (graph.initializer.iter().enumerate())
        .filter(|(_, tensor)| {
            can_move(tensor) && (!on_gpu || onnx::is_float(tensor.data_type())) && !handed_out.contains(tensor.name())
        })
        .map(|(i, tensor)| (tensor.name().to_owned(), i))
        .collect();
    let mut uses = Vec::with_capacity(late.len());
    first_uses(graph, &mut late, &mut uses);
    let head = if on_gpu { head::count(graph, &uses) } else { 0 };
    let mut source = Source::new(data_dir);
    let (table, size) = write_flat(graph, &uses[head..], &mut source, &out.join(WEIGHTS_FILE))?;
    // What is left over is used by nobody; ONNX Runtime would warn of it and drop it.
    let unused: HashSet<usize> = late.into_values().collect();
    let mut index = 0;
    graph.initializer.retain(|_| {
        index += 1;
        !unused.contains(&(index - 1))
    });
    embed(graph, &mut source)?;
    Ok((table, size))
}

fn can_move(tensor: &TensorProto) -> bool {
    bytes_of(tensor).is_some_and(|len| len >= WEIGHT_BYTES_MIN)
}

/// How many bytes a tensor has, where they are not listed one by one.
pub(super) fn bytes_of(tensor: &TensorProto) -> Option<u64> {
    let has_bytes = tensor.raw_data.is_some() || matches!(tensor.external(), Ok(Some(_)));
    (has_bytes && tensor.data_type() < 23).then(|| onnx::data_len(tensor.data_type(), &tensor.dims)).flatten()
}

/// Takes the indices of `late` out in the order in which nodes use them; bodies are used where their node stands.
fn first_uses(graph: &GraphProto, late: &mut HashMap<String, usize>, uses: &mut Vec<usize>) {
    for at in order::of_run(graph) {
        let node = &graph.node[at];
        uses.extend(node.input.iter().filter_map(|name| late.remove(name)));
        node.bodies().for_each(|body| first_uses(body, late, uses));
    }
}

/// Moves large initializers out of bodies, under names that nothing else has.
fn hoist(graph: &mut GraphProto) {
    let mut hoisted = Vec::new();
    for body in graph.node.iter_mut().flat_map(NodeProto::bodies_mut) {
        hoist_from(body, &mut hoisted);
    }
    graph.initializer.extend(hoisted);
}

fn hoist_from(body: &mut GraphProto, hoisted: &mut Vec<TensorProto>) {
    for inner in body.node.iter_mut().flat_map(NodeProto::bodies_mut) {
        hoist_from(inner, hoisted);
    }
    // A body's input may have a default, and a body must produce its outputs itself: those initializers stay.
    let pinned: HashSet<String> = body.input.iter().chain(&body.output).map(|value| value.name().to_owned()).collect();
    let mut renamed = HashMap::new();
    for mut tensor in std::mem::take(&mut body.initializer) {
        if can_move(&tensor) && !pinned.contains(tensor.name()) {
            let name = format!("faaswap/{}/{}", hoisted.len(), tensor.name());
            renamed.insert(tensor.name.replace(name.clone()).unwrap_or_default(), name);
            hoisted.push(tensor);
        } else {
            body.initializer.push(tensor);
        }
    }
    if !renamed.is_empty() {
        rename_reads(body, &renamed);
    }
}

fn rename_reads(graph: &mut GraphProto, renamed: &HashMap<String, String>) {
    for node in &mut graph.node {
        for input in &mut node.input {
            if let Some(name) = renamed.get(input) {
                input.clone_from(name);
            }
        }
        for body in node.bodies_mut() {
            // A name that the inner body defines itself is another value.
            let own = body.input.iter().map(|v| v.name()).chain(body.initializer.iter().map(|t| t.name()));
            let own = own.chain(body.node.iter().flat_map(|node| node.output.iter().map(String::as_str)));
            let own: HashSet<&str> = own.collect();
            let visible: HashMap<_, _> = renamed
                .iter()
                .filter(|(name, _)| !own.contains(name.as_str()))
                .map(|(a, b)| (a.clone(), b.clone()))
                .collect();
            rename_reads(body, &visible);
        }
    }
}

/// The files that hold the optimized graph's data.
pub(super) struct Source<'a> {
    dir: &'a Path,
    open: HashMap<String, File>,
}

impl<'a> Source<'a> {
    pub(super) fn new(dir: &'a Path) -> Self {
        Self { dir, open: HashMap::new() }
    }

    /// All of the tensor's bytes.
    pub(super) fn whole(&mut self, tensor: &TensorProto, len: u64) -> Result<Vec<u8>, EngineError> {
        let (mut data, dir) = (Vec::new(), self.dir);
        let read = self.read(tensor, len)?.read_to_end(&mut data);
        if read.map_err(EngineError::io(dir))? as u64 != len {
            let reason = format!("initializer {} is cut short", tensor.name());
            return Err(EngineError::NotPrepared { path: dir.to_owned(), reason });
        }
        Ok(data)
    }

    /// The tensor's bytes, to be read once.
    fn read<'t>(&'t mut self, tensor: &'t TensorProto, len: u64) -> Result<Box<dyn Read + 't>, EngineError> {
        let Ok(Some(external)) = tensor.external() else {
            return Ok(Box::new(tensor.raw_data.as_deref().unwrap_or_default().take(len)));
        };
        let path = self.dir.join(external.location);
        if !self.open.contains_key(external.location) {
            let file = File::open(&path).map_err(EngineError::io(&path))?;
            self.open.insert(external.location.to_owned(), file);
        }
        let mut file = &self.open[external.location];
        file.seek(SeekFrom::Start(external.offset)).map_err(EngineError::io(&path))?;
        Ok(Box::new(file.take(len)))
    }
}

fn write_flat(
    graph: &mut GraphProto,
    order: &[usize],
    source: &mut Source<'_>,
    path: &Path,
) -> Result<(Vec<Initializer>, u64), EngineError> {
    let mut file = BufWriter::new(File::create(path).map_err(EngineError::io(path))?);
    let mut table = Vec::with_capacity(order.len());
    let mut end = 0_u64;
    for &index in order {
        let tensor = &mut graph.initializer[index];
        let len = onnx::data_len(tensor.data_type(), &tensor.dims).expect("can_move has measured it");
        let offset = end.next_multiple_of(WEIGHT_ALIGN);
        io::copy(&mut io::repeat(0).take(offset - end), &mut file).map_err(EngineError::io(path))?;
        let copied = io::copy(&mut source.read(tensor, len)?, &mut file).map_err(EngineError::io(path))?;
        if copied != len {
            return Err(EngineError::NotPrepared {
                path: path.to_owned(),
                reason: format!("initializer {} has {copied} of {len} bytes", tensor.name()),
            });
        }
        end = offset + len;
        table.push(Initializer {
            name: tensor.name().to_owned(),
            element: tensor.data_type(),
            dims: tensor.dims.clone(),
            offset,
            len,
        });
        tensor.set_external(WEIGHTS_FILE, offset, len);
    }
    file.flush().map_err(EngineError::io(path))?;
    Ok((table, end))
}

/// Puts what is still in files of the optimizer's into the graph: those files go away.
fn embed(graph: &mut GraphProto, source: &mut Source<'_>) -> Result<(), EngineError> {
    for tensor in &mut graph.initializer {
        let in_files = matches!(tensor.external(), Ok(Some(external)) if external.location != WEIGHTS_FILE);
        let Some(len) = onnx::data_len(tensor.data_type(), &tensor.dims).filter(|_| in_files) else {
            continue;
        };
        let data = source.whole(tensor, len)?;
        tensor.set_raw(Buffer::from(data));
    }
    for body in graph.node.iter_mut().flat_map(NodeProto::bodies_mut) {
        embed(body, source)?;
    }
    Ok(())
}
