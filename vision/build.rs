//! Links libtorch.

include!("../build-support/link.rs");

fn main() {
    link_libtorch();
}
