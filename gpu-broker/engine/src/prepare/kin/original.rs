//! An original model seen as its kind and its weights.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use bytes::Bytes as Buffer;
use prost::Message;
use sha2::{Digest, Sha256};

use super::super::inspect;
use crate::{
    EngineError, PrepareError,
    onnx::{self, ModelProto, TensorProto},
};

/// Floats of fewer elements belong to the kind: they are epsilons, scales and other constants on which the graph's shape
/// may depend.
const ELEMENTS_MIN: i64 = 2;

/// A model whose files were judged.
pub(super) struct Original {
    pub(super) model: ModelProto,
    dir: PathBuf,
    /// Places of weights among the initializers, by name.
    weights: HashMap<String, usize>,
}

/// Whether a tensor counts as weights, in an original or in a prepared graph.
pub(super) fn is_weight(tensor: &TensorProto) -> bool {
    let has_bytes = tensor.raw_data.is_some() || matches!(tensor.external(), Ok(Some(_)));
    let elements = tensor.dims.iter().try_fold(1_i64, |n, dim| n.checked_mul(*dim));
    onnx::is_float(tensor.data_type()) && has_bytes && elements.is_some_and(|n| n >= ELEMENTS_MIN)
}

/// Takes a tensor's data away, wherever it lies.
pub(super) fn strip(tensor: &mut TensorProto) {
    tensor.set_raw(Buffer::new());
}

impl Original {
    pub(super) fn open(dir: &Path, graph_file: &str) -> Result<Self, PrepareError> {
        let model = inspect::read_named(dir, graph_file)?;
        inspect::judge(dir, &model)?;
        let initializers = model.graph.iter().flat_map(|graph| graph.initializer.iter().enumerate());
        let weights = initializers.filter(|(_, tensor)| is_weight(tensor));
        let weights = weights.map(|(at, tensor)| (tensor.name().to_owned(), at)).collect();
        Ok(Self { model, dir: dir.to_owned(), weights })
    }

    /// A digest of everything but the weights' values and what people write about a model.
    pub(super) fn kind(&self) -> Result<String, PrepareError> {
        let mut model = self.model.clone();
        (model.producer_name, model.producer_version, model.doc_string) = (None, None, None);
        model.metadata_props.clear();
        let mut hash = Sha256::new();
        if let Some(graph) = &mut model.graph {
            graph.doc_string = None;
            graph.metadata_props.clear();
            for tensor in &mut graph.initializer {
                match is_weight(tensor) {
                    true => strip(tensor),
                    // Values that decide what is computed count, wherever they lie.
                    false => hash.update(self.bytes(tensor)?),
                }
            }
            graph.each_tensor(&mut |tensor| match tensor.external() {
                Ok(Some(_)) => self.bytes(tensor).map(|bytes| hash.update(bytes)),
                Ok(None) | Err(_) => Ok(()),
            })?;
        }
        hash.update(model.encode_to_vec());
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The weights with this name.
    pub(super) fn weight(&self, name: &str) -> Option<&TensorProto> {
        self.model.graph.as_ref()?.initializer.get(*self.weights.get(name)?)
    }

    /// A tensor's bytes; empty where they are listed one by one.
    pub(super) fn bytes(&self, tensor: &TensorProto) -> Result<Buffer, EngineError> {
        let Ok(Some(external)) = tensor.external() else { return Ok(tensor.raw_data.clone().unwrap_or_default()) };
        let path = self.dir.join(external.location);
        let len = onnx::data_len(tensor.data_type(), &tensor.dims).and_then(|len| usize::try_from(len).ok());
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&path)?;
            file.seek(SeekFrom::Start(external.offset))?;
            let mut bytes = vec![0; len.ok_or(io::ErrorKind::InvalidData)?];
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read().map(Buffer::from).map_err(EngineError::io(&path))
    }
}
