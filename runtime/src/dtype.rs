//! The numbers in which weights and what belongs to them are kept.

use serde::{Deserialize, Serialize};
use tch::Kind;

/// A floating-point format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatDtype {
    /// float32.
    #[default]
    #[serde(alias = "f32")]
    Fp32,
    /// bfloat16: the range of float32 with eight bits of precision, in half the bytes.
    Bf16,
}

impl FloatDtype {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        self.kind().elt_size_in_bytes()
    }

    /// The same for libtorch.
    pub fn kind(self) -> Kind {
        match self {
            Self::Fp32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `f32` is what model folders said before.
    #[test]
    fn names_are_read_as_they_were_written() {
        let read = |name: &str| serde_json::from_str::<FloatDtype>(name).unwrap();
        for dtype in [FloatDtype::Fp32, FloatDtype::Bf16] {
            assert_eq!(read(&serde_json::to_string(&dtype).unwrap()), dtype);
        }
        assert_eq!(read("\"f32\""), FloatDtype::Fp32);
    }
}
