//! Writes shards again with the codes of their pictures beside them.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use m6_data::{ShardFile, ShardSet, shard_names};
use m6_run::{fetching, write_atomic};
use m6_vqgan::Vqgan;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tch::Device;

use super::{CodeMember, Views};
use crate::error::{Error, Result};

/// Beside the new shards: what their codes were made from.
const RECIPE: &str = "codes.json";

/// What [`write_code_shards`] is to write.
#[derive(Debug)]
pub struct CodeShards<'a> {
    /// Files, globs, urls or brace lists; each shard must have a file name of its own.
    pub shards: &'a [String],
    /// What is encoded.
    pub views: Views,
    /// Folder of the new shards, which have the names of the old without `.gz`.
    pub out: &'a Path,
}

/// What [`write_code_shards`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CodesReport {
    /// The new member's extension.
    pub member: String,
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
    /// Shards among them that were there already.
    pub kept: usize,
    /// Samples in the shards that were written.
    pub samples: usize,
    /// Samples among them that got codes.
    pub with_codes: usize,
}

/// Writes each shard into a folder again, each sample with all its members and, where it has a picture that can be read,
/// the codes of its views ([`CodeMember`]). A shard that is there already is left as it is, so that the work can be
/// stopped and started again, and be shared out by shards. Crops depend on the seed and the shard's name only.
///
/// # Errors
/// When the folder holds shards or codes of another recipe, shards cannot be read or written, or too many pictures in a
/// row are broken.
pub fn write_code_shards(request: &CodeShards, vqgan: &Vqgan, device: Device) -> Result<CodesReport> {
    let CodeShards { shards, views, out } = request;
    views.check("--transform", vqgan)?;
    let member = CodeMember::of(vqgan)?;
    let names = shard_names(shards)?;
    let targets = targets(&names, out)?;
    keep_recipe(&out.join(RECIPE), views, vqgan)?;
    let mut report = CodesReport { member: member.extension().to_owned(), ..CodesReport::default() };
    for (number, (name, target)) in (1..).zip(names.iter().zip(&targets)) {
        if target.exists() {
            report.kept += 1;
            continue;
        }
        let set = Arc::new(ShardSet::open_with(std::slice::from_ref(name), fetching())?);
        for flaw in set.flaws() {
            eprintln!("m6: {flaw}");
        }
        let file_name = target.file_name().unwrap_or_default().to_string_lossy();
        let title = format!("encode {file_name} ({number} of {})", names.len());
        let views = Views { seed: seed_of(views.seed, &file_name), ..views.clone() };
        let mut file = ShardFile::create_in(out)?;
        let mut next = 0;
        views.encode(&set, vqgan, device, &title, |index, codes| {
            copy(&set, next..index, &mut file)?;
            let codes = codes.map(|codes| member.write(&codes)).transpose()?;
            report.with_codes += usize::from(codes.is_some());
            next = index + 1;
            write(&set, index, codes.map(|codes| (member.extension(), codes)), &mut file)
        })?;
        copy(&set, next..set.len(), &mut file)?;
        report.samples += set.len();
        file.finish(target)?;
    }
    report.shards = targets;
    Ok(report)
}

/// Where each shard goes.
fn targets(names: &[String], out: &Path) -> Result<Vec<PathBuf>> {
    let mut seen = HashSet::new();
    let target = |name: &String| {
        let path = Path::new(name);
        let file_name = path.file_name().filter(|_| !name.starts_with("pipe:"));
        let target = file_name.map(|file_name| out.join(uncompressed(file_name))).ok_or_else(|| {
            Error::Usage(format!("{name}: expected a file or url, after whose name the new shard is named"))
        })?;
        if !seen.insert(target.clone()) {
            return Err(Error::Usage(format!("{name}: an earlier shard has the same file name")));
        }
        let same = |target: &Path| target.canonicalize().ok().zip(path.canonicalize().ok());
        if same(&target).is_some_and(|(new, old)| new == old) {
            return Err(Error::Usage(format!("{name}: is in the folder of the new shards; choose another")));
        }
        Ok(target)
    };
    names.iter().map(target).collect()
}

/// The name of a shard as it is written, whatever it was read from.
fn uncompressed(file_name: &OsStr) -> PathBuf {
    let name = Path::new(file_name);
    match name.extension().and_then(OsStr::to_str) {
        Some("gz") => name.with_extension(""),
        Some("tgz") => name.with_extension("tar"),
        _ => name.to_owned(),
    }
}

/// Writes down by what the codes are made, or checks that those there were made by the same.
fn keep_recipe(path: &Path, views: &Views, vqgan: &Vqgan) -> Result<()> {
    let recipe = Map::from_iter([
        ("vqgan".to_owned(), json!(vqgan.hash())),
        ("transform".to_owned(), json!(views.transform)),
        ("views".to_owned(), json!(views.count)),
        ("seed".to_owned(), json!(views.seed)),
    ]);
    if !path.exists() {
        let json = serde_json::to_vec_pretty(&recipe).map_err(|error| Error::file(path, error))?;
        return Ok(write_atomic(path, &json)?);
    }
    let text = fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    let there: Map<String, Value> = serde_json::from_str(&text).map_err(|error| Error::file(path, error))?;
    match recipe.iter().find(|(key, value)| there.get(*key) != Some(value)) {
        Some((key, value)) => {
            let found = there.get(key).unwrap_or(&Value::Null);
            let path = path.display();
            Err(Error::Usage(format!(
                "{path}: its folder has codes of {key} = {found}; {value} needs another"
            )))
        }
        None => Ok(()),
    }
}

/// Shards of one set get crops that differ.
fn seed_of(seed: u64, file_name: &str) -> u64 {
    let hash = blake3::hash(file_name.as_bytes());
    let (bytes, _) = hash.as_bytes().as_chunks::<8>();
    seed ^ u64::from_le_bytes(bytes[0])
}

fn copy(set: &ShardSet, indices: std::ops::Range<usize>, file: &mut ShardFile) -> Result<()> {
    indices.into_iter().try_for_each(|index| write(set, index, None, file))
}

/// Writes a sample again; a member of the extension of the new one gives way to it.
fn write(set: &ShardSet, index: usize, new: Option<(&str, Vec<u8>)>, file: &mut ShardFile) -> Result<()> {
    let sample = set.sample(index)?;
    let new = new.as_ref().map(|(extension, bytes)| (*extension, bytes.as_slice()));
    let old = sample.members().filter(|(extension, _)| new.is_none_or(|(new, _)| new != *extension));
    let members: Vec<(&str, &[u8])> = old.chain(new).collect();
    Ok(file.write(sample.key, &members)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_named_after_those_they_come_from_and_are_not_compressed() {
        let targets = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            targets(&names, Path::new("out")).map_err(|error| error.to_string())
        };
        let found = targets(&["a/x.tar", "a/y.tar.gz", "https://host/z.tgz"]).unwrap();
        assert_eq!(found, ["out/x.tar", "out/y.tar", "out/z.tar"].map(PathBuf::from));
        let same = targets(&["a/x.tar", "b/x.tar.gz"]).unwrap_err();
        assert!(same.contains("an earlier shard has the same file name"), "{same}");
    }
}
