//! Prepares a model of a known kind: its own weights where those of the first model of that kind were.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::Path,
};

use bytes::Bytes as Buffer;
use prost::Message;

use super::{
    super::{inspect, joined, write_manifest},
    original::Original,
    parts::{self, Part},
};
use crate::{
    EngineError, Manifest, PrepareError, Prepared,
    manifest::{MODEL_FILE, WEIGHTS_FILE},
};

/// Writes graph, weights and, last, the manifest.
pub(super) fn derive(
    original: &Original,
    kin: &Prepared,
    (in_file, in_graph): (&[Part], &[(String, Part)]),
    out: &Path,
) -> Result<(), PrepareError> {
    fs::create_dir_all(out).map_err(EngineError::io(out))?;
    write_graph(original, kin, in_graph, &out.join(MODEL_FILE))?;
    write_weights(original, kin, in_file, &out.join(WEIGHTS_FILE))?;
    // What was compared was the first model's outputs; that this one's are as good follows from the recipe.
    let manifest = Manifest { trial_max_abs_diff: None, ..Manifest::clone(kin.manifest()) };
    write_manifest(out, &manifest)?;
    Ok(())
}

fn write_graph(original: &Original, kin: &Prepared, parts: &[(String, Part)], path: &Path) -> Result<(), PrepareError> {
    let mut model = inspect::read_model(&kin.graph_path())?;
    let graph = model.graph.get_or_insert_default();
    for (name, part) in parts {
        let Some(bytes) = origin(original, part)? else { continue };
        let found = graph.initializer.iter_mut().find(|tensor| tensor.name() == name);
        let tensor = found.filter(|tensor| tensor.raw_data.as_ref().is_some_and(|raw| raw.len() == bytes.len()));
        tensor.ok_or_else(|| changed(name))?.set_raw(Buffer::from(bytes));
    }
    Ok(fs::write(path, model.encode_to_vec()).map_err(EngineError::io(path))?)
}

fn write_weights(original: &Original, kin: &Prepared, parts: &[Part], path: &Path) -> Result<(), PrepareError> {
    let manifest = kin.manifest();
    if parts.len() != manifest.initializers.len() {
        return Err(changed("the table of weights"));
    }
    let from = kin.weights_path();
    let mut old = File::open(&from).map_err(EngineError::io(&from))?;
    let mut file = BufWriter::new(File::create(path).map_err(EngineError::io(path))?);
    let mut end = 0;
    for (weight, part) in manifest.initializers.iter().zip(parts) {
        let failed = EngineError::io(path);
        let bytes = origin(original, part)?;
        if bytes.as_ref().is_some_and(|bytes| bytes.len() as u64 != weight.len) {
            return Err(changed(&weight.name));
        }
        let padded = io::copy(&mut io::repeat(0).take(weight.offset.saturating_sub(end)), &mut file);
        let written = padded.and_then(|_| match bytes {
            Some(bytes) => file.write_all(&bytes),
            None => copy(&mut old, weight.offset, weight.len, &mut file),
        });
        written.map_err(failed)?;
        end = weight.offset + weight.len;
    }
    let failed = EngineError::io(path);
    io::copy(&mut io::repeat(0).take(manifest.weights_bytes.get().saturating_sub(end)), &mut file)
        .and_then(|_| file.flush())
        .map_err(failed)?;
    Ok(())
}

fn copy(from: &mut File, offset: u64, len: u64, to: &mut impl Write) -> io::Result<()> {
    use io::Seek;
    from.seek(io::SeekFrom::Start(offset))?;
    let copied = io::copy(&mut from.take(len), to)?;
    if copied == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// A part's bytes from this model; `None` where they are those of the first.
fn origin(original: &Original, part: &Part) -> Result<Option<Vec<u8>>, PrepareError> {
    let (name, order) = match part {
        Part::Kept => return Ok(None),
        Part::Copied(from) => (from, None),
        Part::Moved { from, order } => (from, Some(&order[..])),
        Part::Joined { rows, parts } => {
            // Some of the first model's beside others of this one's are not learnt.
            let parts = parts.iter().map(|part| origin(original, part)?.ok_or_else(|| changed("a joined matrix")));
            return Ok(Some(joined::beside(&parts.collect::<Result<Vec<_>, _>>()?, *rows)));
        }
    };
    let tensor = original.weight(name).ok_or_else(|| changed(name))?;
    if order.is_some_and(|order| order.len() != tensor.dims.len() || order.iter().any(|at| *at >= tensor.dims.len())) {
        return Err(changed(name));
    }
    let bytes = original.bytes(tensor)?;
    Ok(Some(parts::ordered(&bytes, &tensor.dims, order).into_owned()))
}

fn changed(what: &str) -> PrepareError {
    PrepareError::rejected(format!("{what} is not as the first model of its kind has it"))
}
