//! Makes certificates: an authority that the API server is told to trust, and the webhook's own, signed by it.
//!
//! What time it is, is an argument; when to make new ones is decided here, from the times that were written down.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::{crypto::ring::sign::any_supported_type, pki_types::pem::PemObject, sign::CertifiedKey};
use time::OffsetDateTime;

use crate::limits::{AUTHORITY_LIFE, AUTHORITY_RENEW_LEFT, CERTIFICATE_LIFE, CERTIFICATE_RENEW_LEFT, CLOCKS_DIFFER_BY};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It cannot be made, or an authority cannot be read.
    #[error("a certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
    /// It cannot be used.
    #[error("a certificate cannot be used: {0}")]
    Use(#[from] rustls::Error),
    /// A file or Secret holds no PEM of the kind.
    #[error("{what} is no PEM: {why}")]
    Pem {
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
}

/// An authority as it is written down.
#[derive(Clone, PartialEq, Eq)]
pub struct Authority {
    /// Its certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// When it ends, in seconds since 1970.
    pub ends: i64,
    /// The certificate of the one before, which signed what is still in use.
    pub previous: Option<String>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("ends", &self.ends).finish_non_exhaustive()
    }
}

fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

fn params(common_name: &str, names: Vec<String>, now: i64, life: Duration) -> Result<CertificateParams, rcgen::Error> {
    let at = |unix: i64| OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = at(now.saturating_sub(seconds(CLOCKS_DIFFER_BY)));
    params.not_after = at(now.saturating_add(seconds(life)));
    Ok(params)
}

impl Authority {
    /// A new one, which follows another.
    pub fn new(now: i64, before: Option<&Self>) -> Result<Self, CertificateError> {
        let key = KeyPair::generate()?;
        // Two authorities of one name would be taken for each other while both are trusted.
        let mut params = params(&format!("faaswap-injector-{now}"), Vec::new(), now, AUTHORITY_LIFE)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self {
            certificate: params.self_signed(&key)?.pem(),
            key: key.serialize_pem(),
            ends: now.saturating_add(seconds(AUTHORITY_LIFE)),
            previous: before.map(|before| before.certificate.clone()),
        })
    }

    /// Whether another should take over.
    pub fn is_old(&self, now: i64) -> bool {
        self.ends.saturating_sub(now) < seconds(AUTHORITY_RENEW_LEFT)
    }

    /// What the API server must trust.
    pub fn bundle(&self) -> String {
        format!("{}{}", self.certificate, self.previous.as_deref().unwrap_or_default())
    }

    /// A certificate for these names.
    pub fn sign(&self, names: &[String], now: i64) -> Result<Leaf, CertificateError> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let key = KeyPair::generate()?;
        let common_name = names.first().map_or("faaswap-injector", String::as_str);
        let mut params = params(common_name, names.to_vec(), now, CERTIFICATE_LIFE)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Leaf {
            key: of_pem(&certificate.pem(), &key.serialize_pem())?,
            ends: now.saturating_add(seconds(CERTIFICATE_LIFE)),
            signed_by: self.certificate.clone(),
        })
    }
}

/// The webhook's own certificate, with its key.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// For TLS.
    pub key: std::sync::Arc<CertifiedKey>,
    /// When it ends, in seconds since 1970.
    pub ends: i64,
    signed_by: String,
}

impl Leaf {
    /// Whether it should be replaced: it ends soon, or its signer was.
    pub fn is_old(&self, authority: &Authority, now: i64) -> bool {
        self.signed_by != authority.certificate || self.ends.saturating_sub(now) < seconds(CERTIFICATE_RENEW_LEFT)
    }
}

/// A chain and its key, from PEM.
pub fn of_pem(chain: &str, key: &str) -> Result<std::sync::Arc<CertifiedKey>, CertificateError> {
    let no_pem =
        |what| move |error: rustls::pki_types::pem::Error| CertificateError::Pem { what, why: error.to_string() };
    let chain = rustls::pki_types::CertificateDer::pem_slice_iter(chain.as_bytes());
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(no_pem("the certificate"))?;
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(no_pem("the key"))?;
    Ok(CertifiedKey::new(chain, any_supported_type(&key)?).into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: i64 = 1_790_000_000;

    #[test]
    fn an_authority_is_followed_before_it_ends_and_both_are_trusted_meanwhile() {
        let first = Authority::new(NOW, None).unwrap();
        assert!(!first.is_old(NOW + seconds(AUTHORITY_LIFE - AUTHORITY_RENEW_LEFT) - 1));
        let later = NOW + seconds(AUTHORITY_LIFE - AUTHORITY_RENEW_LEFT) + 1;
        assert!(first.is_old(later));
        let second = Authority::new(later, Some(&first)).unwrap();
        assert!(second.bundle().contains(&first.certificate) && second.bundle().contains(&second.certificate));
        assert!(!format!("{second:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_certificate_is_replaced_before_it_ends_and_when_its_signer_was() {
        let authority = Authority::new(NOW, None).unwrap();
        let leaf = authority.sign(&["a.b.svc".to_owned()], NOW).unwrap();
        assert!(!leaf.is_old(&authority, NOW));
        assert!(leaf.is_old(&authority, NOW + seconds(CERTIFICATE_LIFE - CERTIFICATE_RENEW_LEFT) + 1));
        assert!(leaf.is_old(&Authority::new(NOW + 1, Some(&authority)).unwrap(), NOW));
    }

    #[test]
    fn what_is_no_pem_is_named() {
        let wrong = of_pem("", "no key").unwrap_err().to_string();
        assert!(wrong.contains("the key is no PEM"), "{wrong}");
    }
}
