//! Names of members: which sample they belong to, and as what.

/// webdataset's rule: the key is the path up to the first dot of its file name, the rest is the extension. Hidden files,
/// files without a dot and, in no folder, those named `__...__` belong to no sample.
pub(crate) fn split_key(path: &str) -> Option<(&str, String)> {
    let name_at = path.rfind('/').map_or(0, |slash| slash + 1);
    let dot = name_at + path[name_at..].find('.')?;
    let name = &path[name_at..dot];
    let meta = name_at == 0 && path.starts_with("__") && path.ends_with("__");
    (!name.is_empty() && !meta).then(|| (&path[..dot], path[dot + 1..].to_lowercase()))
}

/// Whether a path stays inside the folder in which it is unpacked, and is written in one way only: names between single
/// slashes, none of them `.` or `..`.
fn is_plain(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|name| !["", ".", ".."].contains(&name))
}

/// The path of a member.
///
/// # Errors
/// Why it would not be read back as given, or not be unpacked in its folder.
pub(crate) fn member_path(key: &str, extension: &str) -> std::result::Result<String, String> {
    let path = format!("{key}.{extension}");
    if extension.is_empty() || split_key(&path).is_none_or(|(found, _)| found != key) {
        return Err(format!("\"{path}\" does not split into this key and extension (no dot in a key)"));
    }
    if !is_plain(&path) {
        return Err(format!(
            "{path:?} is no plain path (names between single slashes, none of them . or ..)"
        ));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths_stay_in_their_folder() {
        for path in ["a", "a/b c/图", "..a/b..", "a/...", "a\\b"] {
            assert!(is_plain(path), "{path}");
        }
        for path in ["", "/", "/a", "a/", "a//b", "./a", "a/./b", "..", "../a", "a/../b", "a/..", "a\0b"] {
            assert!(!is_plain(path), "{path}");
        }
    }

    #[test]
    fn keys_follow_webdataset() {
        let split = |path| split_key(path).map(|(key, ext)| (key.to_owned(), ext));
        assert_eq!(split("a/b.c/d.seg.PNG"), Some(("a/b.c/d".into(), "seg.png".into())));
        assert_eq!(split("no_extension"), None);
        assert_eq!(split("a/.hidden"), None);
        assert_eq!(split("__index__.json"), Some(("__index__".into(), "json".into())));
        assert_eq!(split("a/__meta.x__"), Some(("a/__meta".into(), "x__".into())));
        assert_eq!(split("__meta.x__"), None);
    }
}
