//! Devices by name, random state, determinism and memory figures.

use tch::{Cuda, Device, Tensor};

use crate::error::{Result, RuntimeError};
use crate::ffi;

/// The device of a name: `cpu`, `cuda:N`, or `auto` (the first GPU if this build and machine have one).
///
/// # Errors
/// When the name is unknown or the GPU cannot be used; a run that asks for CUDA never falls back silently.
pub fn device(name: &str) -> Result<Device> {
    let refuse = |reason: String| RuntimeError::Device { asked: name.to_string(), reason };
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(if cfg!(feature = "cuda") { Device::cuda_if_available() } else { Device::Cpu }),
        _ => {
            let index = name
                .strip_prefix("cuda:")
                .and_then(|index| index.parse::<usize>().ok())
                .ok_or_else(|| refuse("expected `cpu`, `auto` or `cuda:N`".into()))?;
            if cfg!(not(feature = "cuda")) {
                return Err(refuse("this build has no CUDA; build with `--features cuda`".into()));
            }
            let found = Cuda::device_count();
            if index as i64 >= found {
                return Err(refuse(format!("this machine has {found} usable GPU(s)")));
            }
            Ok(Device::Cuda(index))
        }
    }
}

/// Has glibc keep the memory of freed tensors for the next ones. By itself it returns every large block to the system,
/// which hands it back page by page, all zeroed: two fifths of the time of encoding pictures on the CPU. To be called
/// before any work.
pub fn keep_freed_memory() {
    // SAFETY: sets three numbers of the allocator.
    unsafe { ffi::m6_keep_freed_memory() }
}

/// Has glibc return to the system what it keeps of freed tensors, for work whose next tensors are of other sizes and would
/// not fit in their places.
pub fn release_freed_memory() {
    // SAFETY: only memory that is free is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        ffi::malloc_trim(0);
    }
}

fn cuda_index(device: Device) -> std::ffi::c_int {
    match device {
        Device::Cuda(index) => index as std::ffi::c_int,
        _ => -1,
    }
}

/// Copies a tensor from the CPU to `device` through pinned memory, without waiting for the copy. On the CPU it is
/// the tensor itself.
///
/// # Errors
/// When libtorch refuses, such as for want of memory.
pub fn upload(host: &Tensor, device: Device) -> Result<Tensor> {
    if !device.is_cuda() {
        return Ok(host.shallow_clone());
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor that libtorch reads; `out` receives a new one on success.
    ffi::check(unsafe { ffi::m6_upload(host.as_ptr(), cuda_index(device), &mut out) })?;
    Ok(ffi::take(out))
}

/// The state of a device's default random generator, a byte tensor on the CPU.
///
/// # Errors
/// When libtorch refuses.
pub fn rng_state(device: Device) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: `out` receives a new tensor on success.
    ffi::check(unsafe { ffi::m6_rng_state(cuda_index(device), &mut out) })?;
    Ok(ffi::take(out))
}

/// Puts a device's default random generator into a state from [`rng_state`].
///
/// # Errors
/// When the state is not one of this kind of device.
pub fn set_rng_state(device: Device, state: &Tensor) -> Result<()> {
    // SAFETY: a live tensor that libtorch only reads.
    ffi::check(unsafe { ffi::m6_set_rng_state(cuda_index(device), state.as_ptr()) })
}

/// Makes libtorch choose deterministic algorithms, or refuse where it has none.
///
/// # Errors
/// When libtorch refuses.
pub fn set_deterministic(on: bool) -> Result<()> {
    // SAFETY: sets process-wide flags only.
    ffi::check(unsafe { ffi::m6_set_deterministic(on) })
}

/// Lets float32 matrix products and convolutions on the GPU use TF32.
///
/// # Errors
/// When libtorch refuses.
pub fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: sets process-wide flags only.
    ffi::check(unsafe { ffi::m6_set_tf32(on) })
}

/// Memory figures in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In use now.
    pub current: u64,
    /// The most that was in use.
    pub peak: u64,
}

/// Memory of a GPU's allocator, or of this process where the device is the CPU.
///
/// # Errors
/// When the figures cannot be read.
pub fn memory(device: Device) -> Result<Memory> {
    match device {
        Device::Cuda(index) => {
            let (mut current, mut peak, mut reserved) = (0, 0, 0);
            // SAFETY: three integers that outlive the call.
            ffi::check(unsafe {
                ffi::m6_device_memory(index as std::ffi::c_int, &mut current, &mut peak, &mut reserved)
            })?;
            Ok(Memory { current: current as u64, peak: peak as u64 })
        }
        _ => process_memory(),
    }
}

fn process_memory() -> Result<Memory> {
    let path = std::path::Path::new("/proc/self/status");
    let status = std::fs::read_to_string(path).map_err(|error| RuntimeError::file(path, error))?;
    let kib = |key: &str| {
        let line = status.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .ok_or_else(|| RuntimeError::file(path, format!("no figure for {key}")))
    };
    Ok(Memory { current: kib("VmRSS:")? * 1024, peak: kib("VmHWM:")? * 1024 })
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn a_wrong_device_is_one_clear_line() {
        let message = device("gpu").unwrap_err().to_string();
        assert_eq!(message, "device `gpu`: expected `cpu`, `auto` or `cuda:N`");
        assert!(device("cuda:99").unwrap_err().to_string().starts_with("device `cuda:99`: this "));
    }

    #[test]
    fn random_state_returns() {
        let state = rng_state(Device::Cpu).unwrap();
        let draw = || Tensor::rand([16], (Kind::Float, Device::Cpu));
        let first = draw();
        set_rng_state(Device::Cpu, &state).unwrap();
        // Other tests of this process may draw between the two lines, hence more than one try.
        let again = (0..100).any(|_| {
            set_rng_state(Device::Cpu, &state).unwrap();
            draw() == first
        });
        assert!(again);
    }

    #[test]
    fn a_foreign_random_state_is_an_error_of_one_line() {
        let message =
            set_rng_state(Device::Cpu, &Tensor::zeros([3], (Kind::Uint8, Device::Cpu))).unwrap_err();
        assert_eq!(message.to_string().lines().count(), 1);
    }

    #[test]
    fn the_process_uses_memory() {
        let memory = memory(Device::Cpu).unwrap();
        assert!(memory.current > 0 && memory.peak >= memory.current);
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_has_random_state_and_memory_figures() {
        let device = device("cuda:0").unwrap();
        let state = rng_state(device).unwrap();
        let draw = || Tensor::rand([16], (Kind::Float, device)).to_device(Device::Cpu);
        let first = draw();
        set_rng_state(device, &state).unwrap();
        assert_eq!(first, draw());
        let before = memory(device).unwrap();
        let held = Tensor::zeros([1 << 20], (Kind::Float, device));
        assert!(memory(device).unwrap().current >= before.current + (4 << 20));
        drop(held);
        assert!(memory(device).unwrap().peak >= before.current + (4 << 20));
    }
}
