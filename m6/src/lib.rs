//! One multimodal transformer.
