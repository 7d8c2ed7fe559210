//! The Await operator: hands its input on unchanged, once the weights up to its group are there.
//!
//! It waits on whatever device the model was bound to and copies nothing: its output aliases its input. Where Await
//! nodes stand in a graph is decided by `prepare`.

use std::{fmt, sync::Arc};

use faaswap_device::{Device, RangeId, Stream};
use faaswap_protocol::DType;
use ort::{
    operator::{BoxedKernel, ComputeContext, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput},
    value::TensorElementType,
};

use crate::{EngineError, onnx::NodeProto, raw};

/// The operators' domain.
pub(crate) const DOMAIN: &str = "faaswap";
/// The attribute that names the last group to wait for.
pub(crate) const GROUP: &str = "group";

/// The operator for values of this type. One per type: the runtime wants operators to have one signature.
pub(crate) const fn op_type(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "AwaitBool",
        DType::U8 => "AwaitU8",
        DType::U16 => "AwaitU16",
        DType::U32 => "AwaitU32",
        DType::U64 => "AwaitU64",
        DType::I8 => "AwaitI8",
        DType::I16 => "AwaitI16",
        DType::I32 => "AwaitI32",
        DType::I64 => "AwaitI64",
        DType::F16 => "AwaitF16",
        DType::Bf16 => "AwaitBf16",
        DType::F32 => "AwaitF32",
        DType::F64 => "AwaitF64",
    }
}

pub(crate) fn is_await(node: &NodeProto) -> bool {
    node.domain() == DOMAIN
}

const fn element(dtype: DType) -> TensorElementType {
    match dtype {
        DType::Bool => TensorElementType::Bool,
        DType::U8 => TensorElementType::Uint8,
        DType::U16 => TensorElementType::Uint16,
        DType::U32 => TensorElementType::Uint32,
        DType::U64 => TensorElementType::Uint64,
        DType::I8 => TensorElementType::Int8,
        DType::I16 => TensorElementType::Int16,
        DType::I32 => TensorElementType::Int32,
        DType::I64 => TensorElementType::Int64,
        DType::F16 => TensorElementType::Float16,
        DType::Bf16 => TensorElementType::Bfloat16,
        DType::F32 => TensorElementType::Float32,
        DType::F64 => TensorElementType::Float64,
    }
}

/// The weights that Await nodes wait for.
#[derive(Clone)]
pub(crate) struct Waiter {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) range: RangeId,
}

impl Waiter {
    /// Blocks the calling thread until the group and all before it are there.
    pub(crate) fn wait(&self, group: u32) -> Result<(), faaswap_device::DeviceError> {
        self.device.await_group(self.range, group, Stream::CALLER)
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("device", &self.device.info().name).field("range", &self.range).finish()
    }
}

/// The operators for values of these types, waiting on these weights.
pub(crate) fn domain(types: &[DType], waiter: &Waiter) -> Result<OperatorDomain, EngineError> {
    let domain = OperatorDomain::new(DOMAIN)?;
    types.iter().try_fold(domain, |domain, &dtype| Ok(domain.add(Await { dtype, waiter: waiter.clone() })?))
}

struct Await {
    dtype: DType,
    waiter: Waiter,
}

impl Operator for Await {
    type Kernel<'attr> = BoxedKernel<'attr>;

    const ALIASES: &[(u32, u32)] = &[(0, 0)];

    fn name(&self) -> &str {
        op_type(self.dtype)
    }

    fn execution_provider_type(&self) -> Option<&str> {
        self.waiter.device.as_cuda().map(|_| "CUDAExecutionProvider")
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(element(self.dtype))]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(element(self.dtype))]
    }

    /// Kernels of one session run on several threads at once, and the binding hands each a `&mut` to the same state.
    /// The state is therefore never written: a group's number and a handle to the device.
    fn create_kernel<'attr>(&self, info: &KernelContext<'attr>) -> ort::Result<Self::Kernel<'attr>> {
        let group: Option<i64> = info.get(GROUP);
        let group = group.and_then(|group| u32::try_from(group).ok());
        let group = group.ok_or_else(|| ort::Error::new("an Await node names no group"))?;
        let waiter = self.waiter.clone();
        Ok(Box::new(move |context: &ComputeContext| {
            let Some(cuda) = waiter.device.as_cuda() else {
                waiter.wait(group).map_err(ort::Error::wrap)?;
                return raw::pass_on(context, raw::copy_on_host);
            };
            let stream = context.stream()?.ok_or_else(|| ort::Error::new("an Await node has no stream"))?;
            let stream = Stream(stream.as_ptr().expose_provenance());
            waiter.device.await_group(waiter.range, group, stream).map_err(ort::Error::wrap)?;
            if let Some(workspace) = cuda.products_workspace().map_err(ort::Error::wrap)? {
                raw::use_workspace(context, workspace)?;
            }
            raw::pass_on(context, |to, from, len| {
                let copied = cuda.copy_within(stream, to.expose_provenance(), from.expose_provenance(), len);
                copied.map_err(ort::Error::wrap)
            })
        }))
    }

    /// Says nothing of the shape: where the input's own is unknown, the binding would make it that of a scalar. What
    /// runs later does not need it, since the graph was optimized before.
    fn infer_shape(&self, _: &mut ort::operator::ShapeInferenceContext) -> ort::Result<()> {
        Ok(())
    }
}
