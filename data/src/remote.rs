//! Shards behind urls. The only part of this crate that is async: each download has a runtime of its own.

use std::time::Duration;

use futures_util::TryStreamExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientConfigKey, ObjectStore, ObjectStoreExt, RetryConfig};

use crate::error::{DataError, Result};
use crate::sink::Sink;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server that sends nothing for this long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a whole shard may take; retries have to begin within it too.
const SHARD_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Retries after the first request. A body that breaks off goes on where it was if the server sends an ETag.
const RETRIES: usize = 2;
/// Characters of a server's reason that are shown.
const MAX_REASON: usize = 300;

type Store = object_store::Result<Box<dyn ObjectStore>>;

/// How long a server is waited for.
struct Patience {
    connect: Duration,
    stall: Duration,
    retries: usize,
}

impl Patience {
    const USUAL: Self = Self { connect: CONNECT_TIMEOUT, stall: STALL_TIMEOUT, retries: RETRIES };

    fn retry(&self) -> RetryConfig {
        RetryConfig { max_retries: self.retries, retry_timeout: SHARD_TIMEOUT, ..RetryConfig::default() }
    }

    /// As settings, so that a builder keeps what the environment told it.
    fn timeouts(&self) -> [(ClientConfigKey, String); 3] {
        let text = |time: Duration| format!("{} ms", time.as_millis());
        [
            (ClientConfigKey::ConnectTimeout, text(self.connect)),
            (ClientConfigKey::ReadTimeout, text(self.stall)),
            (ClientConfigKey::Timeout, text(SHARD_TIMEOUT)),
        ]
    }
}

/// Hands the bytes behind `url` to `sink`.
///
/// # Errors
/// Those of `sink`, or what became of the download, in one line that names the url.
pub(crate) fn download(url: &str, sink: Sink) -> Result<()> {
    install_tls();
    let (store, path) = open(url, &Patience::USUAL).map_err(|error| failed(url, &error))?;
    copy(url, store.as_ref(), &path, sink)
}

/// `reqwest` is built without a provider of its own.
fn install_tls() {
    // Fails where there is one already, which does as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn copy(url: &str, store: &dyn ObjectStore, path: &Path, sink: Sink) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DataError::fetch(url, error.to_string()))?;
    runtime.block_on(async {
        let mut body = store.get(path).await.map_err(|error| failed(url, &error))?.into_stream();
        let mut bytes = 0;
        let broken = |bytes, error| {
            DataError::fetch(url, format!("it broke off after {bytes} bytes: {}", told(&error)))
        };
        while let Some(chunk) = body.try_next().await.map_err(|error| broken(bytes, error))? {
            bytes += chunk.len();
            sink(&chunk)?;
        }
        Ok(())
    })
}

/// The store that serves `url`, and where in it; credentials come from the environment.
fn open(url: &str, patience: &Patience) -> object_store::Result<(Box<dyn ObjectStore>, Path)> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
    Ok(match scheme {
        "s3" => (s3(AmazonS3Builder::from_env(), place, patience)?, Path::parse(path)?),
        "gs" => (gs(GoogleCloudStorageBuilder::from_env(), place, patience)?, Path::parse(path)?),
        _ => {
            let (path, query) =
                path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
            let query = query.map(|query| format!("?{query}")).unwrap_or_default();
            let base = format!("{scheme}://{place}/{query}");
            (http(&base, patience)?, Path::from_url_path(path)?)
        }
    })
}

fn s3(builder: AmazonS3Builder, bucket: &str, patience: &Patience) -> Store {
    let set =
        |builder: AmazonS3Builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value);
    let builder = patience.timeouts().into_iter().fold(builder, set);
    Ok(Box::new(builder.with_bucket_name(bucket).with_retry(patience.retry()).build()?))
}

fn gs(builder: GoogleCloudStorageBuilder, bucket: &str, patience: &Patience) -> Store {
    let set = |builder: GoogleCloudStorageBuilder, (key, value)| {
        builder.with_config(GoogleConfigKey::Client(key), value)
    };
    let builder = patience.timeouts().into_iter().fold(builder, set);
    Ok(Box::new(builder.with_bucket_name(bucket).with_retry(patience.retry()).build()?))
}

fn http(base: &str, patience: &Patience) -> Store {
    // A redirect must not lead from https to http.
    let plain = base.starts_with("http://").to_string();
    let builder = HttpBuilder::new().with_url(base).with_config(ClientConfigKey::AllowHttp, plain);
    let builder = patience
        .timeouts()
        .into_iter()
        .fold(builder, |builder, (key, value)| builder.with_config(key, value));
    Ok(Box::new(builder.with_retry(patience.retry()).build()?))
}

fn failed(url: &str, error: &object_store::Error) -> DataError {
    DataError::fetch(url, told(error))
}

/// One line with the error and its innermost cause, which says what the outer ones leave out.
fn told(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let (mut reason, cause) = (error.to_string(), cause.to_string());
    if !reason.contains(&cause) {
        reason = format!("{reason}: {cause}");
    }
    let words: Vec<&str> = reason.split_whitespace().collect();
    words.join(" ").chars().take(MAX_REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Answer, Server};

    const HASTE: Patience =
        Patience { connect: Duration::from_secs(5), stall: Duration::from_millis(300), retries: 1 };

    fn bytes_of(url: &str, opened: object_store::Result<(Box<dyn ObjectStore>, Path)>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (store, path) = opened.map_err(|error| failed(url, &error))?;
        copy(url, store.as_ref(), &path, &mut |chunk| {
            bytes.extend_from_slice(chunk);
            Ok(())
        })?;
        Ok(bytes)
    }

    fn fetch(url: &str) -> Result<Vec<u8>> {
        install_tls();
        bytes_of(url, open(url, &HASTE))
    }

    #[test]
    fn a_server_that_fails_or_stalls_is_an_error_that_names_the_url() {
        let body = vec![7; 100_000];
        let server = Server::start(&[
            ("/a%20b.tar?key=1", Answer::Whole(body.clone())),
            ("/cut", Answer::Cut(body.clone())),
            ("/stall", Answer::Stall(body.clone())),
            ("/silence", Answer::Silence),
        ]);
        assert_eq!(fetch(&server.url("/a%20b.tar?key=1")).unwrap(), body);
        for (path, expected) in [
            ("/absent", "404 Not Found: no such file"),
            ("/cut", "end of file before message length reached"),
            ("/stall", "operation timed out"),
            ("/silence", "operation timed out"),
        ] {
            let error = fetch(&server.url(path)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cannot fetch {}: ", server.url(path))), "{error}");
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
            let broke_off = error.contains(": it broke off after 99999 bytes: ");
            assert_eq!(broke_off, ["/cut", "/stall"].contains(&path), "{error}");
        }
        let requests = server.requests();
        let count = |path| requests.iter().filter(|request| *request == path).count();
        assert_eq!(["/absent", "/silence"].map(count), [1, 2], "only what may get better is tried again");
    }

    #[test]
    fn a_url_leads_to_its_store() {
        install_tls();
        let shown = |url| {
            open(url, &HASTE)
                .map(|(store, path)| format!("{store} {path}"))
                .map_err(|e| failed(url, &e).to_string())
        };
        assert_eq!(shown("s3://bucket/a/b.tar").unwrap(), "AmazonS3(bucket) a/b.tar");
        assert_eq!(shown("gs://bucket/a/b.tar").unwrap(), "GoogleCloudStorage(bucket) a/b.tar");
        assert_eq!(shown("https://host:8080/a/b.tar").unwrap(), "HttpStore a/b.tar");
        let error = shown("s3://bucket/../b.tar").unwrap_err();
        assert!(error.starts_with("cannot fetch s3://bucket/../b.tar: "), "{error}");
    }

    #[test]
    fn a_bucket_is_read_with_credentials_and_their_lack_is_told() {
        install_tls();
        let server = Server::start(&[("/bucket/a/b.tar", Answer::Whole(vec![7; 10]))]);
        let (url, at) = ("s3://bucket/a/b.tar", server.url(""));
        let builder =
            || AmazonS3Builder::new().with_endpoint(&at).with_metadata_endpoint(&at).with_allow_http(true);
        let get = |builder| {
            bytes_of(url, s3(builder, "bucket", &HASTE).map(|store| (store, Path::from("a/b.tar"))))
        };
        let known = builder().with_access_key_id("id").with_secret_access_key("secret");
        assert_eq!(get(known).unwrap(), [7; 10]);
        let error = get(builder()).unwrap_err().to_string();
        assert!(error.starts_with("cannot fetch s3://bucket/a/b.tar: ") && !error.contains('\n'), "{error}");

        let url = "gs://bucket/a.tar";
        let builder = GoogleCloudStorageBuilder::new().with_service_account_path("/no/such/key.json");
        let error = failed(url, &gs(builder, "bucket", &HASTE).err().unwrap()).to_string();
        assert!(
            error.starts_with(&format!("cannot fetch {url}: ")) && error.contains("/no/such/key.json"),
            "{error}"
        );
    }
}
