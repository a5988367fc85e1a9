//! Compiles the C++ shim against the libtorch that `tch` links; with the feature `cuda`, the kernels too.

use std::path::{Path, PathBuf};
use std::process::Command;

include!("../build-support/link.rs");

/// Code for Ampere and Hopper, and what the driver compiles for later ones.
const ARCHITECTURES: [&str; 3] = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_90,code=compute_90",
];

/// What launches work of our own on a GPU.
const CUDA_FILES: [&str; 9] =
    ["copies", "cuda_graph", "experts", "gates", "launch", "norms", "products", "rotary", "short_attention"];

fn main() {
    link_libtorch();
    let lib = libtorch_lib();
    let include = Path::new(&lib).join("../include");
    println!("cargo:rerun-if-changed=csrc");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .flag_if_supported("-Wno-unused-parameter")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .files(["csrc/adamw.cpp", "csrc/head.cpp", "csrc/shim.cpp"]);
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let toolkit = toolkit(Path::new(&lib));
        let files = CUDA_FILES.map(|name| format!("csrc/{name}.cpp"));
        build.define("M6_CUDA", None).include(toolkit.join("include")).files(files);
        compile_kernels(&toolkit);
    }
    build.compile("m6_runtime_shim");
}

/// CUDA's compiler and headers: `CUDA_HOME`, or the packages beside libtorch.
fn toolkit(lib: &Path) -> PathBuf {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let beside = || lib.join("../../nvidia/cu13");
    let toolkit = std::env::var_os("CUDA_HOME").map_or_else(beside, PathBuf::from);
    let nvcc = toolkit.join("bin/nvcc");
    assert!(
        nvcc.is_file(),
        "{} is missing: run `CUDA=1 make setup`, or let CUDA_HOME name a CUDA 13 toolkit",
        nvcc.display()
    );
    toolkit
}

/// `csrc/kernels` to `kernels.fatbin` in the output folder.
fn compile_kernels(toolkit: &Path) {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let status = Command::new(toolkit.join("bin/nvcc"))
        .args(["-std=c++17", "-O3", "-fatbin", "-Wno-deprecated-gpu-targets"])
        .args(ARCHITECTURES)
        .arg("-I")
        .arg(toolkit.join("include"))
        .arg("csrc/kernels/kernels.cu")
        .arg("-o")
        .arg(out.join("kernels.fatbin"))
        .status()
        .expect("nvcc is there and can be run");
    assert!(status.success(), "nvcc could not compile csrc/kernels/kernels.cu; see its message above");
}
