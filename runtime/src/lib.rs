//! What libtorch can do and tch does not bind; the only home of unsafe and C++.
