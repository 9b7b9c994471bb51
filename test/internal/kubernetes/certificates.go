package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"time"
)

// certificateLife is long enough for any lab session.
const certificateLife = 30 * 24 * time.Hour

// writeCertificates makes an authority and every certificate that a cluster needs, in the folder "pki", and the kubeconfig
// files with them.
func (c *Cluster) writeCertificates() error {
	if err := os.MkdirAll(c.path("pki"), 0o700); err != nil {
		return err
	}
	authority, err := newAuthority(c.path("pki/ca.crt"))
	if err != nil {
		return err
	}
	server, client := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	admin := pkix.Name{Organization: []string{"system:masters"}, CommonName: "admin"}
	errs := []error{
		authority.issue(c.path("pki/apiserver"), pkix.Name{CommonName: "kube-apiserver"}, server, c.address(1)),
		authority.issue(c.path("pki/apiserver-kubelet"), pkix.Name{Organization: admin.Organization, CommonName: "apiserver-kubelet"}, client),
		authority.issue(c.path("pki/admin"), admin, client),
		c.writeKubeconfig(c.Kubeconfig(), "admin"),
	}
	for _, n := range c.nodes {
		user := pkix.Name{Organization: []string{"system:nodes"}, CommonName: "system:node:" + n.Address}
		errs = append(errs,
			authority.issue(c.path("pki/kubelet-server-"+n.Address), pkix.Name{CommonName: n.Address}, server, n.Address),
			authority.issue(c.path("pki/kubelet-client-"+n.Address), user, client),
			c.writeKubeconfig(c.path("pki/kubelet-"+n.Address+".kubeconfig"), "kubelet-client-"+n.Address),
		)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return errors.Join(append(errs, writeKey(c.path("pki/service-accounts.key"), key))...)
}

// authority is a certificate authority whose key exists only in memory.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	issued      int64
}

func newAuthority(path string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "streamshim test cluster"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(certificateLife),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{certificate: certificate, key: key, issued: 1}, writePEM(path, "CERTIFICATE", der, 0o644)
}

// issue writes path.crt and path.key.
func (a *authority) issue(path string, subject pkix.Name, usage x509.ExtKeyUsage, addresses ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	a.issued++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.issued), Subject: subject,
		NotBefore: a.certificate.NotBefore, NotAfter: a.certificate.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(address))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		return fmt.Errorf("issue %s: %w", path, err)
	}
	return errors.Join(writePEM(path+".crt", "CERTIFICATE", der, 0o644), writeKey(path+".key", key))
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key) // the only form of an EC key that service accounts accept
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

// Kubeconfig returns the path of the administrator's kubeconfig file.
func (c *Cluster) Kubeconfig() string { return c.path("kubeconfig") }

func (c *Cluster) writeKubeconfig(path, certificate string) error {
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://%[1]s:%[2]d", certificate-authority: %[3]q}}]
users: [{name: user, user: {client-certificate: %[4]q, client-key: %[5]q}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
`, c.address(1), apiServerPort, c.path("pki/ca.crt"), c.path("pki/"+certificate+".crt"), c.path("pki/"+certificate+".key"))
	return os.WriteFile(path, []byte(text), 0o600)
}

// httpClient returns an HTTP client that is the administrator.
func (c *Cluster) httpClient() (*http.Client, error) {
	certificate, err := tls.LoadX509KeyPair(c.path("pki/admin.crt"), c.path("pki/admin.key"))
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(c.path("pki/ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}},
	}}, nil
}
