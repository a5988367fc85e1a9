//! Names of members: which sample they belong to, and as what.

/// webdataset's rule: the key is the path up to the first dot of its file name, the rest is the extension. Hidden files,
/// files without a dot and `__meta__` files belong to no sample.
pub(crate) fn split_key(path: &str) -> Option<(&str, String)> {
    let name_at = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name_at + path[name_at..].find('.')?;
    let name = &path[name_at..dot];
    let meta = name.starts_with("__") && name.ends_with("__");
    (!name.is_empty() && !meta).then(|| (&path[..dot], path[dot + 1..].to_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_webdataset() {
        let split = |path| split_key(path).map(|(key, ext)| (key.to_owned(), ext));
        assert_eq!(split("a/b.c/d.seg.PNG"), Some(("a/b.c/d".into(), "seg.png".into())));
        assert_eq!(split("no_extension"), None);
        assert_eq!(split("a/.hidden"), None);
        assert_eq!(split("__index__.json"), None);
    }
}
