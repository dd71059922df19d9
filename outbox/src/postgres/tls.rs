//! TLS by rustls, as far as libpq's modes ask for it.

use std::{fs::File, io::BufReader, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::config::{Tls, TlsMode};
use crate::{LogError, LogErrorKind};

pub(super) fn connector(tls: &Tls) -> Result<MakeRustlsConnect, LogError> {
    let provider = Arc::new(ring::default_provider());
    let roots = match tls.mode {
        TlsMode::VerifyCa | TlsMode::VerifyFull => Some(roots(tls)?),
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => None,
    };
    let trusted = roots.map(|roots| {
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| wrong(format!("the trusted certificates cannot be used: {error}")))
    });
    let verifier = Verifier {
        trusted: trusted.transpose()?,
        any_name: tls.mode == TlsMode::VerifyCa,
        provider: Arc::clone(&provider),
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(format!("TLS cannot be used: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// The certificates to trust: those of the file that is named, else the machine's.
fn roots(tls: &Tls) -> Result<RootCertStore, LogError> {
    let mut roots = RootCertStore::empty();
    match &tls.root {
        Some(path) => {
            let file =
                File::open(path).map_err(|error| wrong(format!("`sslrootcert` {path} cannot be read: {error}")))?;
            for certificate in CertificateDer::pem_reader_iter(BufReader::new(file)) {
                let certificate =
                    certificate.map_err(|error| wrong(format!("`sslrootcert` {path} is no PEM file: {error}")))?;
                roots.add(certificate).map_err(|error| wrong(format!("`sslrootcert` {path}: {error}")))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(wrong("there is no certificate to trust: name a file with `sslrootcert`".to_owned()));
    }
    Ok(roots)
}

fn wrong(message: String) -> LogError {
    LogError::new(LogErrorKind::Invalid, message)
}

/// Believes a server as far as the mode asks: anyone, one with a certificate we trust, or one that has it for its name.
#[derive(Debug)]
struct Verifier {
    trusted: Option<Arc<WebPkiServerVerifier>>,
    any_name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(trusted) = &self.trusted else { return Ok(ServerCertVerified::assertion()) };
        match trusted.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.any_name => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
