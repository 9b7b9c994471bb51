package nodeinstall

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

// API asks the API server for one node. It is a Readiness.
type API struct {
	server, node string
	client       *http.Client
	token        func() (string, error) // nil without one
}

// requestTimeout bounds one question to the API server, maxNode its answer in bytes.
const (
	requestTimeout = 10 * time.Second
	maxNode        = 16 << 20
)

// ServiceAccount returns the API as the service account whose token and ca.crt are in the folder. The
// token is read again for each question, because it is renewed.
func ServiceAccount(folder, server, node string) (*API, error) {
	ca, err := os.ReadFile(filepath.Join(folder, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("service account: %w", err)
	}
	return newAPI(server, node, ca, nil, func() (string, error) {
		text, err := os.ReadFile(filepath.Join(folder, "token"))
		return strings.TrimSpace(string(text)), err
	})
}

// Kubeconfig returns the API as the user of a kubeconfig file, such as the kubelet's own: client
// certificates and tokens, in the file or named by it. A file whose user is a program's answer (exec), as
// on EKS, is refused.
func Kubeconfig(file, node string) (*API, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the kubelet's kubeconfig: %w; name another one with --kubeconfig", err)
	}
	var c struct {
		CurrentContext string `json:"current-context"`
		Contexts       []struct {
			Name    string                         `json:"name"`
			Context struct{ Cluster, User string } `json:"context"`
		} `json:"contexts"`
		Clusters []struct {
			Name    string `json:"name"`
			Cluster struct {
				Server string `json:"server"`
				CA     string `json:"certificate-authority"`
				CAData []byte `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
		Users []struct {
			Name string `json:"name"`
			User struct {
				Certificate     string `json:"client-certificate"`
				CertificateData []byte `json:"client-certificate-data"`
				Key             string `json:"client-key"`
				KeyData         []byte `json:"client-key-data"`
				Token           string `json:"token"`
				TokenFile       string `json:"tokenFile"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := yaml.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	content := func(path string, data []byte) ([]byte, error) {
		if len(data) > 0 || path == "" {
			return data, nil
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(file), path)
		}
		return os.ReadFile(path)
	}
	for _, context := range c.Contexts {
		if context.Name != c.CurrentContext {
			continue
		}
		for _, cluster := range c.Clusters {
			for _, user := range c.Users {
				if cluster.Name != context.Context.Cluster || user.Name != context.Context.User {
					continue
				}
				ca, caErr := content(cluster.Cluster.CA, cluster.Cluster.CAData)
				certificate, certificateErr := content(user.User.Certificate, user.User.CertificateData)
				key, keyErr := content(user.User.Key, user.User.KeyData)
				if err := errors.Join(caErr, certificateErr, keyErr); err != nil {
					return nil, fmt.Errorf("%s: %w", file, err)
				}
				switch {
				case len(certificate) > 0:
					pair, err := tls.X509KeyPair(certificate, key)
					if err != nil {
						return nil, fmt.Errorf("%s: %w", file, err)
					}
					return newAPI(cluster.Cluster.Server, node, ca, []tls.Certificate{pair}, nil)
				case user.User.Token != "" || user.User.TokenFile != "":
					return newAPI(cluster.Cluster.Server, node, ca, nil, func() (string, error) {
						token, err := content(user.User.TokenFile, []byte(user.User.Token))
						return strings.TrimSpace(string(token)), err
					})
				}
			}
		}
	}
	return nil, fmt.Errorf("%s has no current context with a client certificate or a token; name another one with --kubeconfig", file)
}

func newAPI(server, node string, ca []byte, certificates []tls.Certificate, token func() (string, error)) (*API, error) {
	config := &tls.Config{Certificates: certificates}
	if len(ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, errors.New("the API server's certificate authority is no PEM certificate")
		}
	}
	return &API{server: strings.TrimSuffix(server, "/"), node: node, token: token, client: &http.Client{
		Timeout: requestTimeout,
		// No kept connections: one that was opened before the network was restarted would only cost time.
		Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: requestTimeout}).DialContext},
	}}, nil
}

// Ready implements Readiness by the node's condition Ready. A kubelet writes its status when it starts, so
// a heartbeat from before the restart is an old kubelet's.
func (a *API) Ready(ctx context.Context, since time.Time) (bool, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, a.server+"/api/v1/nodes/"+a.node, http.NoBody)
	if err != nil {
		return false, "", err
	}
	if a.token != nil {
		token, err := a.token()
		if err != nil {
			return false, "", err
		}
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := a.client.Do(request)
	if err != nil {
		return false, "", err
	}
	defer response.Body.Close() //nolint:errcheck // it was read
	text, err := io.ReadAll(io.LimitReader(response.Body, maxNode))
	if err != nil {
		return false, "", err
	}
	if response.StatusCode != http.StatusOK {
		return false, "", fmt.Errorf("GET node %s: %s: %.200s", a.node, response.Status, text)
	}
	return nodeReady(text, since)
}

func nodeReady(text []byte, since time.Time) (bool, string, error) {
	var node struct {
		Status struct {
			Conditions []struct {
				Type, Status, Reason, Message string
				LastHeartbeatTime             time.Time
			}
		}
	}
	if err := json.Unmarshal(text, &node); err != nil {
		return false, "", err
	}
	for _, c := range node.Status.Conditions {
		switch {
		case c.Type != "Ready":
		case c.LastHeartbeatTime.Before(since.Truncate(time.Second)): // the API has no fractions
			return false, "the kubelet has not written its status since its restart", nil
		default:
			return c.Status == "True", c.Reason + ": " + c.Message, nil
		}
	}
	return false, "the node has no condition Ready", nil
}
