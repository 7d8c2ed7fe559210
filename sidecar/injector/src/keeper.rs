//! Keeps certificates fresh: the authority in a Secret that all replicas share, trust in it in the webhook's
//! configuration, and this replica's certificate in memory.
//!
//! A Secret is written only over the version that was read, so replicas cannot overwrite each other's authority.

use std::{
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use k8s_openapi::{
    ByteString,
    api::{admissionregistration::v1::MutatingWebhookConfiguration, core::v1::Secret},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::{
    certificate::{Authority, CertificateError, Leaf, of_pem},
    limits::{CERTIFICATES_AGAIN_AFTER, CERTIFICATES_EVERY, CERTIFICATES_WITHIN, CONFLICTS_MAX},
    settings::Settings,
    telemetry::Telemetry,
};

/// The certificate that is in use; none at first.
#[derive(Debug, Default)]
pub struct Current(RwLock<Option<Arc<CertifiedKey>>>);

impl Current {
    /// Whether connections can be taken.
    pub fn is_there(&self) -> bool {
        self.get().is_some()
    }

    fn get(&self) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on, new connections see this one.
    pub fn set(&self, key: Arc<CertifiedKey>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

/// Why certificates are not fresh.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// One cannot be made or read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The API server declines or does not answer.
    #[error("the API server: {0}")]
    Api(#[from] Box<kube::Error>),
    /// A file cannot be read.
    #[error("{0}: {1}")]
    File(std::path::PathBuf, std::io::Error),
    /// Others kept writing the Secret.
    #[error("the Secret was changed by others {CONFLICTS_MAX} times in a row")]
    Conflicts,
    /// It took too long.
    #[error("not done within {CERTIFICATES_WITHIN:?}")]
    Slow,
}

impl From<kube::Error> for KeepError {
    fn from(error: kube::Error) -> Self {
        Self::Api(Box::new(error))
    }
}

/// Looks after the certificates for ever.
pub async fn keep(settings: Settings, current: Arc<Current>, telemetry: Arc<Telemetry>) {
    let mut leaf = None;
    loop {
        let looked = match &settings.tls_dir {
            Some(folder) => from_folder(folder).map(|key| current.set(key)),
            None => match timeout(CERTIFICATES_WITHIN, from_cluster(&settings, &mut leaf)).await {
                Ok(Ok(fresh)) => {
                    current.set(Arc::clone(&fresh.key));
                    telemetry.certificate_until(fresh.ends);
                    Ok(())
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(KeepError::Slow),
            },
        };
        let pause = match looked {
            Ok(()) => CERTIFICATES_EVERY,
            Err(error) => {
                telemetry.certificate_failed();
                tracing::error!(%error, "certificates are not fresh");
                CERTIFICATES_AGAIN_AFTER
            }
        };
        sleep(pause).await;
    }
}

fn from_folder(folder: &Path) -> Result<Arc<CertifiedKey>, KeepError> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).map_err(|error| KeepError::File(path, error))
    };
    Ok(of_pem(&read("tls.crt")?, &read("tls.key")?)?)
}

async fn from_cluster<'a>(settings: &Settings, leaf: &'a mut Option<Leaf>) -> Result<&'a Leaf, KeepError> {
    let client = Client::try_default().await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    refresh(client, settings, leaf, i64::try_from(now).unwrap_or(i64::MAX)).await
}

/// One look: afterwards the authority is young enough and trusted, and the certificate is signed by it.
pub async fn refresh<'a>(
    client: Client,
    settings: &Settings,
    leaf: &'a mut Option<Leaf>,
    now: i64,
) -> Result<&'a Leaf, KeepError> {
    let secrets = Api::<Secret>::namespaced(client.clone(), &settings.namespace);
    let authority = authority(&secrets, &settings.secret, now).await?;
    // First trust, then use: the other way round, reviews would fail in between.
    trust(&Api::all(client), &settings.webhook, &authority).await?;
    match leaf.take().filter(|leaf| !leaf.is_old(&authority, now)) {
        Some(fresh) => Ok(leaf.insert(fresh)),
        None => {
            let Settings { service, namespace, .. } = settings;
            let names = [format!("{service}.{namespace}.svc"), format!("{service}.{namespace}.svc.cluster.local")];
            Ok(leaf.insert(authority.sign(&names, now)?))
        }
    }
}

async fn authority(secrets: &Api<Secret>, name: &str, now: i64) -> Result<Authority, KeepError> {
    for _ in 0..CONFLICTS_MAX {
        let there = secrets.get_opt(name).await?;
        let known = there.as_ref().and_then(read);
        if let Some(known) = known.as_ref().filter(|known| !known.is_old(now)) {
            return Ok(known.clone());
        }
        let new = Authority::new(now, known.as_ref())?;
        let written = match there {
            None => secrets.create(&PostParams::default(), &write(name, &new, None)).await,
            Some(old) => {
                let new = write(name, &new, old.metadata.resource_version);
                secrets.replace(name, &PostParams::default(), &new).await
            }
        };
        match written {
            Ok(_) => {
                tracing::info!(secret = name, "new authority");
                return Ok(new);
            }
            // Another replica was first: its authority is taken.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(KeepError::Conflicts)
}

/// The authority in a Secret; `None` where it is not whole.
fn read(secret: &Secret) -> Option<Authority> {
    let text = |key: &str| String::from_utf8(secret.data.as_ref()?.get(key)?.0.clone()).ok();
    Some(Authority {
        certificate: text("tls.crt")?,
        key: text("tls.key")?,
        ends: text("ends")?.parse().ok()?,
        previous: text("previous.crt").filter(|previous| !previous.is_empty()),
    })
}

fn write(name: &str, authority: &Authority, version: Option<String>) -> Secret {
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let mut secret = Secret::default();
    secret.metadata.name = Some(name.to_owned());
    secret.metadata.resource_version = version;
    secret.data = Some(
        [
            ("tls.crt", authority.certificate.as_str()),
            ("tls.key", &authority.key),
            ("ends", &authority.ends.to_string()),
            ("previous.crt", authority.previous.as_deref().unwrap_or_default()),
        ]
        .map(|(key, value)| (key.to_owned(), bytes(value)))
        .into(),
    );
    secret
}

/// Tells the API server whom to trust, where it does not know yet.
async fn trust(
    webhooks: &Api<MutatingWebhookConfiguration>,
    name: &str,
    authority: &Authority,
) -> Result<(), KeepError> {
    let bundle = ByteString(authority.bundle().into_bytes());
    let configuration = webhooks.get(name).await?;
    let stale = |at: &usize| {
        let webhook = configuration.webhooks.as_ref().and_then(|webhooks| webhooks.get(*at));
        webhook.is_some_and(|webhook| webhook.client_config.ca_bundle.as_ref() != Some(&bundle))
    };
    let count = configuration.webhooks.as_ref().map_or(0, Vec::len);
    let changes: Vec<_> = (0..count)
        .filter(stale)
        .map(|at| json!({"op": "add", "path": format!("/webhooks/{at}/clientConfig/caBundle"), "value": bundle}))
        .collect();
    if changes.is_empty() {
        return Ok(());
    }
    // Cannot fail: these are operations of that form.
    let changes = serde_json::from_value(changes.into()).unwrap_or_default();
    webhooks.patch(name, &PatchParams::default(), &Patch::<()>::Json(changes)).await?;
    tracing::info!(webhook = name, "the API server trusts the authority");
    Ok(())
}
