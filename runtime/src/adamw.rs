//! AdamW of many parameters at once: a kernel of our own on a GPU, libtorch's elsewhere.

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::Result;
use crate::ffi;
use crate::optim_config::OptimizerConfig;

/// What one call updates: lists of equal length of live tensors that only an optimizer and its layers share.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    params: Vec<*const C_tensor>,
    grads: Vec<Tensor>,
    firsts: Vec<*const C_tensor>,
    seconds: Vec<*const C_tensor>,
    steps: Vec<*const C_tensor>,
    streams: Vec<u32>,
}

/// How far a step goes.
#[derive(Debug)]
pub(crate) struct Rates<'a> {
    /// A float64 scalar on the device of the parameters.
    pub(crate) lr: &'a Tensor,
    pub(crate) config: OptimizerConfig,
}

impl Batch {
    /// A parameter with its gradient, its moments and the count of its steps; all but the gradient outlive the batch. A
    /// parameter in bf16 is rounded by lot, the lots of a step being those of `stream`.
    pub(crate) fn push(
        &mut self,
        param: &Tensor,
        grad: Tensor,
        first: &Tensor,
        second: &Tensor,
        step: &Tensor,
        stream: u32,
    ) {
        self.params.push(param.as_ptr());
        self.grads.push(grad);
        self.firsts.push(first.as_ptr());
        self.seconds.push(second.as_ptr());
        self.steps.push(step.as_ptr());
        self.streams.push(stream);
    }

    /// One update by the gradients times the scalar `factor`, unless `norm`, theirs, is not finite. The kernel scales what
    /// it reads, which saves a pass; elsewhere the gradients are scaled where they are.
    pub(crate) fn step(&self, rates: &Rates<'_>, norm: &Tensor, factor: &Tensor) -> Result<()> {
        if self.params.is_empty() {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        crate::fused::kernels::load();
        let grads = ffi::pointers(&self.grads);
        let Rates { lr, config } = rates;
        // SAFETY: the lists are what they say; norm and factor are float32 scalars on the same device.
        ffi::check(unsafe {
            ffi::m6_adamw(
                grads.len(),
                self.params.as_ptr(),
                grads.as_ptr(),
                self.firsts.as_ptr(),
                self.seconds.as_ptr(),
                self.steps.as_ptr(),
                self.streams.as_ptr(),
                lr.as_ptr(),
                config.beta1,
                config.beta2,
                config.weight_decay,
                config.eps,
                norm.as_ptr(),
                factor.as_ptr(),
            )
        })
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::dtype::FloatDtype;
    use crate::optim::Optimizer;
    use crate::params::{Group, Init, Params};

    #[test]
    fn kernels_step_as_the_host_does() {
        assert_as_the_host(FloatDtype::Fp32, FloatDtype::Fp32, 1e-5);
    }

    /// Here and there a moment is rounded to the other side.
    #[test]
    fn kernels_keep_bf16_moments_as_the_host_does() {
        assert_as_the_host(FloatDtype::Bf16, FloatDtype::Fp32, 5e-3);
    }

    /// Or a weight: the lots are the same, what they decide about is not to the last bit.
    #[test]
    fn kernels_round_bf16_weights_as_the_host_does() {
        assert_as_the_host(FloatDtype::Fp32, FloatDtype::Bf16, 5e-3);
        assert_as_the_host(FloatDtype::Bf16, FloatDtype::Bf16, 5e-3);
    }

    #[track_caller]
    fn assert_as_the_host(moments: FloatDtype, weights: FloatDtype, tolerance: f64) {
        let config = OptimizerConfig { weight_decay: 0.1, moments, ..OptimizerConfig::default() };
        // More parameters than a launch takes, some of several blocks and none of whole words.
        let shapes: Vec<i64> = (0..70).map(|i| if i % 16 == 0 { 20_001 + i } else { 1 + i }).collect();
        let run = |device: Device| {
            let params = Params::new(device, 3).with_matrices(weights);
            let add = |i: usize| {
                let group = if i.is_multiple_of(2) { Group::Decay } else { Group::NoDecay };
                // Some are vectors, which stay float32.
                let shape = if i.is_multiple_of(5) { vec![shapes[i]] } else { vec![1, shapes[i]] };
                params.add(&format!("p{i}"), &shape, Init::Normal(1.0), group)
            };
            let tensors: Vec<Tensor> = (0..shapes.len()).map(add).collect();
            let mut optimizer = Optimizer::new(&params, config);
            optimizer.set_lr(0.01);
            let mut norms = Vec::new();
            for step in 0..5 {
                optimizer.zero_grad().unwrap();
                let scale = if step == 3 { f64::INFINITY } else { 1.0 };
                let each = tensors.iter().map(|t| (t * t * t).sum(Kind::Float));
                (each.sum::<Tensor>() * scale).backward();
                norms.push(optimizer.step(2.0).unwrap().double_value(&[]));
            }
            let state = optimizer.state().into_iter().map(|(_, tensor)| tensor);
            (norms, tensors.into_iter().chain(state).map(|t| t.to_device(Device::Cpu)).collect::<Vec<_>>())
        };
        let ((host_norms, host), (norms, device)) = (run(Device::Cpu), run(Device::Cuda(0)));
        for (host, here) in host_norms.iter().zip(norms).filter(|(host, _)| host.is_finite()) {
            assert!((host / here - 1.0).abs() < tolerance, "{host} {here}");
        }
        for (index, (host, here)) in host.iter().zip(&device).enumerate() {
            assert_eq!(host.kind(), here.kind());
            let [host, here] = [host, here].map(|tensor| tensor.to_kind(Kind::Float));
            let gap = ((&host - here).norm() / (host.norm() + 1e-6)).double_value(&[]);
            assert!(gap < tolerance, "{index}: {gap}");
        }
    }
}
