// Shared by the build scripts of all crates that link libtorch: `include!("../build-support/link.rs");`.
// Cargo does not pass link arguments from a dependency on to the final binary (rust-lang/cargo#9554), so each
// crate with a binary, test, bench or example has to repeat them.

/// Folder of libtorch's shared libraries, as torch-sys found it.
///
/// The crate needs torch-sys as a direct dependency: only then does Cargo tell its build script.
fn libtorch_lib() -> String {
    std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys must be a direct dependency of this crate")
}

/// Makes this crate's binaries and tests find libtorch without `LD_LIBRARY_PATH`, and with the crate's feature
/// `cuda` keeps the CUDA half of libtorch, which no symbol refers to and the linker would drop.
fn link_libtorch() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../build-support/link.rs");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libtorch_lib());
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        // libtorch_cuda names libraries of other packages that only its own run path finds.
        for arg in
            ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda", "-ltorch", "-Wl,--allow-shlib-undefined"]
        {
            println!("cargo:rustc-link-arg={arg}");
        }
    }
}
