//! A small stack of strided convolutions that is trained with the transformer: at small sizes it learns faster than
//! linear patches (Xiao et al. 2021, "Early convolutions help transformers see better").

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::{Kind, Tensor};

use crate::COLOURS;

/// Groups of the norms between the convolutions.
pub const NORM_GROUPS: i64 = 16;
const NORM_EPS: f64 = 1e-6;
const MAX_CHANNELS: i64 = 1 << 16;
const MAX_HALVINGS: usize = 8;

/// Convolutions of stride 2 with norm and SiLU between them.
#[derive(Debug)]
pub(crate) struct Convolutions(Vec<(Conv2d, GroupNorm)>);

/// What is wrong with the channels, in one line naming the key.
pub(crate) fn validate(channels: &[i64]) -> Result<(), String> {
    if !(1..=MAX_HALVINGS).contains(&channels.len()) {
        return Err(format!("channels = {channels:?}: expected one to eight widths"));
    }
    match channels.iter().find(|&&c| !(1..=MAX_CHANNELS).contains(&c) || c % NORM_GROUPS != 0) {
        Some(width) => Err(format!(
            "channels = {channels:?}: {width} is not a multiple of {NORM_GROUPS} up to {MAX_CHANNELS}"
        )),
        None => Ok(()),
    }
}

impl Convolutions {
    pub(crate) fn new(params: &Params, channels: &[i64]) -> Self {
        let mut input = COLOURS;
        let layers = channels.iter().enumerate().map(|(i, &output)| {
            let conv = Conv2d::new(&(params / "conv" / i), input, output, 3, 2, 1);
            input = output;
            (conv, GroupNorm::new(&(params / "norm" / i), NORM_GROUPS, output, NORM_EPS))
        });
        Self(layers.collect())
    }

    /// `[b, 3, side, side]` bytes to features `[b, c, g, g]` in `kind`.
    pub(crate) fn forward(&self, pictures: &Tensor, kind: Kind) -> Tensor {
        let x = crate::centred(pictures).to_kind(kind);
        self.0.iter().fold(x, |x, (conv, norm)| norm.forward(&conv.forward(&x)).silu())
    }
}
