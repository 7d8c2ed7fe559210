//! The raw calls into ONNX Runtime that its Rust binding does not offer: tensors at given addresses, initializers
//! supplied from outside, runs that write into memory of ours, the shared scratch arena.
//!
//! The only module of this crate with `unsafe`. What it hands out is safe: a tensor keeps the memory under it borrowed
//! or alive, a session keeps its initializers.

#![expect(unsafe_code, reason = "one of the three fences: the engine's raw calls into ONNX Runtime")]

use std::{
    ffi::{CStr, CString, c_char, c_void},
    marker::PhantomData,
    path::Path,
    ptr::{self, NonNull},
};

use faaswap_device::Stream;
use faaswap_protocol::{Bytes, DType, Shape};
use faaswap_slab::Region;
use ort::{
    AsPointer,
    environment::Environment,
    ep::CUDA,
    operator::ComputeContext,
    session::{Session, builder::SessionBuilder},
    sys::{self, ONNXTensorElementDataType as Element},
};

use crate::{EngineError, manifest::Initializer, onnx};

mod cublas;
mod cuda;

pub(crate) use cublas::use_workspace;
pub use cuda::register;
pub(crate) use cuda::{DeviceRun, device_tensor, share_device_memory};

/// Turns a status into a result, and frees it.
fn check(status: sys::OrtStatusPtr) -> Result<(), EngineError> {
    // SAFETY: the status comes from the call that the caller has just made, and is used by nobody else.
    Ok(unsafe { ort::Error::result_from_status(status) }?)
}

/// The version that the library itself reports.
pub(crate) fn library_version(path: &Path) -> Result<String, String> {
    // SAFETY: loading runs the library's initializers. The operator has named this file as ONNX Runtime; that it is
    // trusted is the premise of loading it at all.
    let library = unsafe { libloading::Library::new(path) }.map_err(|e| e.to_string())?;
    // SAFETY: a library that exports this name does so with this type, in all its versions.
    let base = unsafe { library.get::<unsafe extern "system" fn() -> *const sys::OrtApiBase>(c"OrtGetApiBase") };
    let base = base.map_err(|_| "it does not export OrtGetApiBase: it is not ONNX Runtime".to_owned())?;
    // SAFETY: the function takes nothing and returns a pointer to a static table.
    let base = unsafe { base() };
    // SAFETY: the table is static and its first two entries have not changed since the first version.
    let base = unsafe { base.as_ref() }.ok_or("OrtGetApiBase returned nothing")?;
    // SAFETY: the function takes nothing and returns a static text.
    let version = unsafe { (base.GetVersionString)() };
    // SAFETY: the text is static and ends with a zero byte; it is copied before the library can be closed.
    let version = unsafe { CStr::from_ptr(version) }.to_string_lossy().into_owned();
    Ok(version)
}

/// Registers one arena from which all sessions that ask for it take their scratch memory.
pub(crate) fn share_scratch(environment: &Environment, most: Bytes) -> Result<(), EngineError> {
    // Extend by what is asked for (1), not by powers of two (0): a shared arena grows to the largest run and stays.
    let keys = [c"max_mem".as_ptr(), c"arena_extend_strategy".as_ptr()];
    let values = [most.as_len().unwrap_or(usize::MAX), 1];
    let mut config = ptr::null_mut();
    // SAFETY: both tables have two entries, as said; the texts are static; `config` receives an object of ours.
    check(unsafe { (ort::api().CreateArenaCfgV2)(keys.as_ptr(), values.as_ptr(), keys.len(), &raw mut config) })?;
    let info = MemoryInfo::cpu(sys::OrtAllocatorType::OrtArenaAllocator)?;
    // SAFETY: all three objects are alive; the environment copies what it needs of the other two.
    let done = check(unsafe {
        (ort::api().CreateAndRegisterAllocator)(environment.ptr().cast_mut(), info.0.as_ptr(), config)
    });
    // SAFETY: it was created above and is not used any more.
    unsafe { (ort::api().ReleaseArenaCfg)(config) };
    done
}

/// Has a session's kernels run on this stream.
pub(crate) fn on_stream(provider: CUDA, stream: Stream) -> CUDA {
    // SAFETY: the stream is one of a device's lanes, which live as long as the device, which outlives its sessions.
    unsafe { provider.with_compute_stream(ptr::with_exposed_provenance_mut(stream.0)) }
}

/// Where tensors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    /// On the GPU of this number.
    Cuda(i32),
}

/// Says where tensors lie, in ONNX Runtime's words.
pub(crate) struct MemoryInfo(NonNull<sys::OrtMemoryInfo>);

// SAFETY: the object is never changed after it was made.
unsafe impl Send for MemoryInfo {}
// SAFETY: as above.
unsafe impl Sync for MemoryInfo {}

impl MemoryInfo {
    fn cpu(kind: sys::OrtAllocatorType) -> Result<Self, EngineError> {
        let mut info = ptr::null_mut();
        // SAFETY: `info` receives an object of ours.
        check(unsafe { (ort::api().CreateCpuMemoryInfo)(kind, sys::OrtMemType::OrtMemTypeDefault, &raw mut info) })?;
        NonNull::new(info).map(Self).ok_or_else(|| EngineError::Ort("no memory info was made".to_owned()))
    }

    pub(crate) fn of(place: Place) -> Result<Self, EngineError> {
        let kind = sys::OrtAllocatorType::OrtDeviceAllocator;
        let Place::Cuda(ordinal) = place else { return Self::cpu(kind) };
        let mut info = ptr::null_mut();
        let usage = sys::OrtMemType::OrtMemTypeDefault;
        // SAFETY: the name is static and ends with zero; `info` receives an object of ours.
        check(unsafe { (ort::api().CreateMemoryInfo)(c"Cuda".as_ptr(), kind, ordinal, usage, &raw mut info) })?;
        NonNull::new(info).map(Self).ok_or_else(|| EngineError::Ort("no memory info was made".to_owned()))
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::OrtMemoryInfo {
        self.0.as_ptr()
    }
}

impl Drop for MemoryInfo {
    fn drop(&mut self) {
        // SAFETY: it is ours and not used any more; tensors made with it hold copies.
        unsafe { (ort::api().ReleaseMemoryInfo)(self.0.as_ptr()) };
    }
}

/// Dimensions in ONNX Runtime's type.
pub(crate) fn dims_of(shape: &Shape) -> Vec<i64> {
    // A shape's element count fits in 60 bits, but a dimension beside a zero may be larger; then the call is refused.
    shape.dims().iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect()
}

/// ONNX Runtime's element type. Its numbers are ONNX's up to 23.
fn element(number: i32) -> Option<Element> {
    use Element as E;
    let known = [
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_COMPLEX64,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_COMPLEX128,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FNUZ,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E5M2,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E5M2FNUZ,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4,
        E::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4,
    ];
    known.into_iter().find(|&element| element as i32 == number)
}

/// A tensor over memory that `'m` keeps in place.
pub(crate) struct Tensor<'m> {
    value: NonNull<sys::OrtValue>,
    memory: PhantomData<&'m mut [u8]>,
}

// SAFETY: the object is a counted reference to a description of memory; it is only read once it was made.
unsafe impl Send for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tensor<'_> {}

impl<'m> Tensor<'m> {
    /// A tensor that a run reads.
    pub(crate) fn input(bytes: &'m [u8], dtype: DType, shape: &Shape) -> Result<Self, EngineError> {
        // SAFETY: the bytes are borrowed for 'm. A run never writes to its inputs.
        unsafe {
            Self::at(Place::Host, bytes.as_ptr().cast_mut(), bytes.len(), onnx::element_of(dtype), &dims_of(shape))
        }
    }

    /// A tensor that a run writes.
    pub(crate) fn output(bytes: &'m mut [u8], dtype: DType, shape: &Shape) -> Result<Self, EngineError> {
        // SAFETY: the bytes are borrowed, and nobody else's, for 'm.
        unsafe { Self::at(Place::Host, bytes.as_mut_ptr(), bytes.len(), onnx::element_of(dtype), &dims_of(shape)) }
    }

    /// A tensor in shared memory, read or written by a run. Its bytes may change at any time; see `prepare::shared`
    /// for which tensors kernels can bear that.
    pub(crate) fn region(region: &'m Region, dtype: DType, shape: &Shape) -> Result<Self, EngineError> {
        // SAFETY: the region is borrowed for 'm and keeps its mapping alive.
        unsafe { Self::at(Place::Host, region.as_mut_ptr(), region.len(), onnx::element_of(dtype), &dims_of(shape)) }
    }

    /// # Safety
    /// `len` bytes from `data` must stay mapped or reserved for `'m`; what a run does with them must be allowed.
    pub(crate) unsafe fn at(
        place: Place,
        data: *mut u8,
        len: usize,
        number: i32,
        dims: &[i64],
    ) -> Result<Self, EngineError> {
        let element =
            element(number).ok_or_else(|| EngineError::Ort(format!("no tensors of element type {number}")))?;
        let info = MemoryInfo::of(place)?;
        let mut value = ptr::null_mut();
        // SAFETY: the table of dimensions has the length said; ONNX Runtime checks that `len` covers them and copies
        // the dimensions and the memory info. The caller answers for `data`.
        check(unsafe {
            (ort::api().CreateTensorWithDataAsOrtValue)(
                info.0.as_ptr(),
                data.cast::<c_void>(),
                len,
                dims.as_ptr(),
                dims.len(),
                element,
                &raw mut value,
            )
        })?;
        Self::own(value)
    }

    fn own(value: *mut sys::OrtValue) -> Result<Self, EngineError> {
        let value = NonNull::new(value).ok_or_else(|| EngineError::Ort("no tensor was made".to_owned()))?;
        Ok(Self { value, memory: PhantomData })
    }

    /// ONNX Runtime's own object.
    pub(crate) fn as_ptr(&self) -> *mut sys::OrtValue {
        self.value.as_ptr()
    }

    /// Element type and dimensions.
    pub(crate) fn describe(&self) -> Result<(Option<DType>, Vec<i64>), EngineError> {
        let mut info = ptr::null_mut();
        // SAFETY: the value is alive; `info` receives an object of ours.
        check(unsafe { (ort::api().GetTensorTypeAndShape)(self.value.as_ptr(), &raw mut info) })?;
        let described = describe(info);
        // SAFETY: it was made above and is not used any more.
        unsafe { (ort::api().ReleaseTensorTypeAndShapeInfo)(info) };
        described
    }

    /// The tensor's bytes: `len` of them, as its type and dimensions say.
    pub(crate) fn bytes(&self) -> Result<&[u8], EngineError> {
        let mut len = 0;
        // SAFETY: the value is alive and a tensor.
        check(unsafe { (ort::api().GetTensorSizeInBytes)(self.value.as_ptr(), &raw mut len) })?;
        let data = data_of(self.value.as_ptr())?;
        if len == 0 || data.is_null() {
            return Ok(&[]);
        }
        // SAFETY: ONNX Runtime says that so many bytes lie there; they live as long as the value, and outputs that
        // ONNX Runtime allocates are written by nobody after the run.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }
}

impl Drop for Tensor<'_> {
    fn drop(&mut self) {
        // SAFETY: it is ours and not used any more; ONNX Runtime counts its own references to the memory.
        unsafe { (ort::api().ReleaseValue)(self.value.as_ptr()) };
    }
}

fn describe(info: *const sys::OrtTensorTypeAndShapeInfo) -> Result<(Option<DType>, Vec<i64>), EngineError> {
    let mut element = Element::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    // SAFETY: the caller's object is alive.
    check(unsafe { (ort::api().GetTensorElementType)(info, &raw mut element) })?;
    let mut rank = 0;
    // SAFETY: as above.
    check(unsafe { (ort::api().GetDimensionsCount)(info, &raw mut rank) })?;
    let mut dims = vec![0_i64; rank];
    // SAFETY: as above; the table has the length said.
    check(unsafe { (ort::api().GetDimensions)(info, dims.as_mut_ptr(), rank) })?;
    Ok((onnx::dtype_of(element as i32), dims))
}

fn data_of(value: *const sys::OrtValue) -> Result<*mut u8, EngineError> {
    let mut data = ptr::null_mut();
    // SAFETY: the caller's value is alive and a tensor; the call changes nothing.
    check(unsafe { (ort::api().GetTensorMutableData)(value.cast_mut(), &raw mut data) })?;
    Ok(data.cast())
}

/// Initializers at fixed addresses, to be supplied to a session that must not outlive them.
pub(crate) struct Weights {
    tensors: Vec<Tensor<'static>>,
}

impl Weights {
    /// Describes the initializers at `base` and supplies them. `reserved` bytes from there must stay reserved for as long as the
    /// session may run; it must go before the returned object. That no run touches them while nothing is mapped there is what
    /// Await nodes are for.
    pub(crate) fn supply(
        builder: &mut SessionBuilder,
        place: Place,
        base: usize,
        reserved: Bytes,
        table: &[Initializer],
    ) -> Result<Self, EngineError> {
        let mut tensors = Vec::with_capacity(table.len());
        for weight in table {
            let out_of_range = || EngineError::Ort(format!("initializer {} lies outside its weights", weight.name));
            let end = weight.offset.checked_add(weight.len).ok_or_else(out_of_range)?;
            let offset = usize::try_from(weight.offset).map_err(|_| out_of_range())?;
            let len = usize::try_from(weight.len).map_err(|_| out_of_range())?;
            let address = base.checked_add(offset).filter(|_| end <= reserved.get()).ok_or_else(out_of_range)?;
            let data = ptr::with_exposed_provenance_mut(address);
            // SAFETY: the stretch lies inside the reserved range, which the caller keeps for as long as the session may run.
            // Initializers are only read.
            let tensor = unsafe { Tensor::<'static>::at(place, data, len, weight.element, &weight.dims) }?;
            let name = c_name(&weight.name)?;
            // SAFETY: builder, name and tensor are alive. ONNX Runtime copies the name and keeps the tensor's address:
            // the boxed value itself does not move and lives in `tensors`.
            check(unsafe { (ort::api().AddInitializer)(builder.ptr_mut(), name.as_ptr(), tensor.value.as_ptr()) })?;
            tensors.push(tensor);
        }
        Ok(Self { tensors })
    }

    /// How many initializers there are.
    pub(crate) fn len(&self) -> usize {
        self.tensors.len()
    }
}

/// A name as ONNX Runtime wants it.
pub(crate) fn c_name(name: &str) -> Result<CString, EngineError> {
    CString::new(name).map_err(|_| EngineError::Ort(format!("the name {name:?} has a zero byte")))
}

/// One run. `outputs` holds tensors to be written, or `None` where ONNX Runtime shall allocate: those are returned, at
/// the same positions. They may be inputs handed through, so they live as long as those. Any number of runs of one
/// session may happen at once.
pub(crate) fn run<'i>(
    session: &Session,
    input_names: &[CString],
    inputs: &[Tensor<'i>],
    output_names: &[&CStr],
    outputs: &[Option<Tensor<'_>>],
) -> Result<Vec<Option<Tensor<'i>>>, EngineError> {
    assert!(input_names.len() == inputs.len() && output_names.len() == outputs.len(), "names and tensors go in pairs");
    let input_names: Vec<*const c_char> = input_names.iter().map(|name| name.as_ptr()).collect();
    let output_names: Vec<*const c_char> = output_names.iter().map(|name| name.as_ptr()).collect();
    let input_values: Vec<*const sys::OrtValue> = inputs.iter().map(|t| t.value.as_ptr().cast_const()).collect();
    let mut values: Vec<*mut sys::OrtValue> =
        outputs.iter().map(|t| t.as_ref().map_or(ptr::null_mut(), |t| t.value.as_ptr())).collect();
    // SAFETY: all tables have the lengths said, all names end with zero, all values live until the end of the call.
    // The session is not changed: ONNX Runtime allows concurrent runs, although its C signature takes it as mutable.
    // On failure it leaves the table of values as it was.
    check(unsafe {
        (ort::api().Run)(
            session.ptr().cast_mut(),
            ptr::null(),
            input_names.as_ptr(),
            input_values.as_ptr(),
            input_values.len(),
            output_names.as_ptr(),
            output_names.len(),
            values.as_mut_ptr(),
        )
    })?;
    let fresh = values.into_iter().zip(outputs).map(|(value, given)| match given {
        Some(_) => Ok(None),
        None => Tensor::own(value).map(Some),
    });
    fresh.collect()
}

/// Hands an operator's input on as its output. Costs nothing where the runtime has let the output alias the input, as
/// it does unless the graph needs both apart; else `copy` gets target, source and length.
pub(crate) fn pass_on(
    context: &ComputeContext,
    copy: impl FnOnce(*mut u8, *const u8, usize) -> ort::Result<()>,
) -> ort::Result<()> {
    let input = context.input(0)?.ok_or_else(|| ort::Error::new("an Await node has no input"))?;
    let output =
        context.output(0, input.shape().to_vec())?.ok_or_else(|| ort::Error::new("an Await node has no output"))?;
    let (from, to) = (data_of(input.ptr()), data_of(output.ptr()));
    let (from, to) = (from.map_err(ort::Error::wrap)?, to.map_err(ort::Error::wrap)?);
    if from == to {
        return Ok(());
    }
    COPIES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut len = 0;
    // SAFETY: the value is alive and a tensor.
    check(unsafe { (ort::api().GetTensorSizeInBytes)(input.ptr(), &raw mut len) }).map_err(ort::Error::wrap)?;
    copy(to, from, len)
}

/// Copies a tensor in host memory.
pub(crate) fn copy_on_host(to: *mut u8, from: *const u8, len: usize) -> ort::Result<()> {
    // SAFETY: both are tensors of an Await node, of the same type and dimensions, so that `len` bytes lie at each; a
    // planner that does not alias them gives them memory apart.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
    Ok(())
}

/// How often an Await had to copy, in this process: a figure to watch, expected to stay 0.
static COPIES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// How often an Await had to copy its input since the process started.
pub fn await_copies() -> u64 {
    COPIES.load(std::sync::atomic::Ordering::Relaxed)
}

/// Private memory, aligned as every kernel wants it.
#[derive(Debug)]
pub(crate) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
#[expect(dead_code, reason = "its bytes are only reached through slices over several lines")]
struct Line([u8; 64]);

impl Aligned {
    /// Zeros.
    pub(crate) fn new(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the lines hold at least `len` bytes, all of them set; any byte is a valid `u8`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the lines are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Whether kernels may use memory at this address.
pub(crate) fn is_aligned(bytes: &[u8], dtype: DType) -> bool {
    usize::try_from(dtype.size()).is_ok_and(|size| bytes.as_ptr().addr().is_multiple_of(size))
}
