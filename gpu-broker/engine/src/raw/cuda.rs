//! The raw calls for kernels on a GPU: memory from a device's arenas, and runs whose inputs and outputs lie on the device.

use std::{
    collections::BTreeSet,
    ffi::{CString, c_void},
    ptr::{self, NonNull},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use faaswap_device::{Device, DeviceError, cuda::Registered};
use faaswap_slab::Region;
use ort::{AsPointer, environment::Environment, session::Session, sys};

use super::{MemoryInfo, Place, Tensor, check};
use crate::EngineError;

/// The version of the C interface that the table of functions below follows.
const INTERFACE: u32 = 24;

/// ONNX Runtime's table of functions, and behind it what ours need. It stays for the process: the environment keeps its
/// address.
#[repr(C)]
struct Allocator {
    table: sys::OrtAllocator,
    info: MemoryInfo,
    device: Mutex<Weak<dyn Device>>,
}

/// The allocators that were registered, by GPU.
static REGISTERED: Mutex<BTreeSet<(i32, usize)>> = Mutex::new(BTreeSet::new());

/// Has sessions that share allocators take their memory on this GPU from the device's arenas.
pub(crate) fn share_device_memory(environment: &Environment, device: &Arc<dyn Device>) -> Result<(), EngineError> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let ordinal = cuda.ordinal();
    let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(&(_, address)) = registered.iter().find(|(known, _)| *known == ordinal) {
        let known = ptr::with_exposed_provenance::<Allocator>(address);
        // SAFETY: registered allocators are never freed.
        let known = unsafe { &*known };
        *known.device.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(device);
        return Ok(());
    }
    // SAFETY: all fields of the table are integers or optional functions, for which zero is a value.
    let mut table = unsafe { std::mem::zeroed::<sys::OrtAllocator>() };
    table.version = INTERFACE;
    table.Alloc = Some(allocate);
    table.Free = Some(free);
    table.Info = Some(info);
    table.Reserve = Some(reserve);
    let device = Mutex::new(Arc::downgrade(device));
    let allocator = Box::new(Allocator { table, info: MemoryInfo::of(Place::Cuda(ordinal))?, device });
    let address = Box::into_raw(allocator);
    // SAFETY: the environment is alive; the allocator begins with the table and is never freed.
    check(unsafe { (ort::api().RegisterAllocator)(environment.ptr().cast_mut(), address.cast()) })?;
    registered.insert((ordinal, address.expose_provenance()));
    Ok(())
}

/// # Safety
/// `this` must be an [`Allocator`] of ours.
unsafe fn device_of(this: *const sys::OrtAllocator) -> Option<Arc<dyn Device>> {
    // SAFETY: the caller's promise; allocators are never freed.
    let this = unsafe { &*this.cast::<Allocator>() };
    this.device.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
}

unsafe extern "system" fn allocate(this: *mut sys::OrtAllocator, len: usize) -> *mut c_void {
    // SAFETY: ONNX Runtime calls this with the table that we registered.
    let device = unsafe { device_of(this) };
    match device.as_ref().and_then(|device| device.as_cuda()).map(|cuda| cuda.allocate(len)) {
        Some(Ok(address)) => ptr::with_exposed_provenance_mut(address),
        Some(Err(error)) => {
            tracing::error!(%error, len, "device memory for a session cannot be had");
            ptr::null_mut()
        }
        None => ptr::null_mut(),
    }
}

unsafe extern "system" fn reserve(this: *const sys::OrtAllocator, len: usize) -> *mut c_void {
    // SAFETY: as for `allocate`, which only reads the table.
    unsafe { allocate(this.cast_mut(), len) }
}

unsafe extern "system" fn free(this: *mut sys::OrtAllocator, address: *mut c_void) {
    // SAFETY: as above.
    let device = unsafe { device_of(this) };
    if let Some(cuda) = device.as_ref().and_then(|device| device.as_cuda())
        && !address.is_null()
    {
        cuda.free(address.expose_provenance());
    }
}

unsafe extern "system" fn info(this: *const sys::OrtAllocator) -> *const sys::OrtMemoryInfo {
    // SAFETY: as above.
    let this = unsafe { &*this.cast::<Allocator>() };
    this.info.as_ptr()
}

/// A run whose inputs and outputs are tensors on a device: it queues kernels and waits for none.
pub(crate) struct DeviceRun<'s> {
    session: &'s Session,
    binding: NonNull<sys::OrtIoBinding>,
    options: NonNull<sys::OrtRunOptions>,
    /// The tensors that are bound.
    tensors: Vec<Tensor<'static>>,
}

impl<'s> DeviceRun<'s> {
    pub(crate) fn new(session: &'s Session) -> Result<Self, EngineError> {
        let none = || EngineError::Ort("no binding was made".to_owned());
        let mut options = ptr::null_mut();
        // SAFETY: `options` receives an object of ours.
        check(unsafe { (ort::api().CreateRunOptions)(&raw mut options) })?;
        let options = NonNull::new(options).ok_or_else(none)?;
        let key = c"disable_synchronize_execution_providers".as_ptr();
        // SAFETY: the object is alive, the texts are static.
        let told = check(unsafe { (ort::api().AddRunConfigEntry)(options.as_ptr(), key, c"1".as_ptr()) });
        let mut binding = ptr::null_mut();
        // SAFETY: the session is alive; `binding` receives an object of ours.
        let made = check(unsafe { (ort::api().CreateIoBinding)(session.ptr().cast_mut(), &raw mut binding) });
        let Some(binding) = NonNull::new(binding) else {
            // SAFETY: it was made above and is not used any more.
            unsafe { (ort::api().ReleaseRunOptions)(options.as_ptr()) };
            return Err(made.and(told).err().unwrap_or_else(none));
        };
        let run = Self { session, binding, options, tensors: Vec::new() };
        made.and(told).map(|()| run)
    }

    pub(crate) fn bind_input(&mut self, name: &CString, tensor: Tensor<'static>) -> Result<(), EngineError> {
        // SAFETY: all objects are alive; the binding keeps a reference to the tensor's memory, which `tensors` describes.
        check(unsafe { (ort::api().BindInput)(self.binding.as_ptr(), name.as_ptr(), tensor.as_ptr()) })?;
        self.tensors.push(tensor);
        Ok(())
    }

    pub(crate) fn bind_output(&mut self, name: &CString, tensor: Tensor<'static>) -> Result<(), EngineError> {
        // SAFETY: as above.
        check(unsafe { (ort::api().BindOutput)(self.binding.as_ptr(), name.as_ptr(), tensor.as_ptr()) })?;
        self.tensors.push(tensor);
        Ok(())
    }

    /// Queues the run's kernels.
    pub(crate) fn queue(&self) -> Result<(), EngineError> {
        // SAFETY: all objects are alive, and one thread at a time uses this binding.
        check(unsafe {
            (ort::api().RunWithBinding)(self.session.ptr().cast_mut(), self.options.as_ptr(), self.binding.as_ptr())
        })
    }
}

impl Drop for DeviceRun<'_> {
    fn drop(&mut self) {
        // SAFETY: ours, and not used any more.
        unsafe { (ort::api().ReleaseIoBinding)(self.binding.as_ptr()) };
        // SAFETY: as above.
        unsafe { (ort::api().ReleaseRunOptions)(self.options.as_ptr()) };
    }
}

/// A tensor on a device.
///
/// The memory is a lane's stretch for inputs and outputs, or a device's scratch: both stay mapped as long as the device
/// lives, which outlives every session on it. Nothing in this process reads it but kernels and the device's own copies.
pub(crate) fn device_tensor(
    ordinal: i32,
    address: usize,
    len: usize,
    element: i32,
    dims: &[i64],
) -> Result<Tensor<'static>, EngineError> {
    // SAFETY: see above: the memory outlives the tensor, and the host never touches it.
    unsafe { Tensor::at(Place::Cuda(ordinal), ptr::with_exposed_provenance_mut(address), len, element, dims) }
}

/// Registers shared memory for all GPUs, so that programs read large inputs there. `None` where the device is no GPU.
pub fn register(device: &dyn Device, region: &Region) -> Result<Option<Registered>, DeviceError> {
    let Some(cuda) = device.as_cuda() else { return Ok(None) };
    // SAFETY: a region lies in a mapping, for reading and writing, that is not moved or shortened while the region or a clone
    // of it lives: the clone is the owner.
    unsafe { cuda.register(region.as_ptr(), region.len(), region.clone()) }.map(Some)
}
