package config

import (
	"fmt"
	"net"
)

// validateTelemetry checks metrics and traces.
func (c *Config) validateTelemetry() []*ValueError {
	var checks []*ValueError
	switch {
	case c.MetricsAddress != "":
		checks = append(checks, hostPort("metrics_address", c.MetricsAddress))
		if c.Profiling {
			checks = append(checks, profilingAddress(c.MetricsAddress))
		}
	case c.Profiling:
		checks = append(checks, &ValueError{"profiling", "is served at metrics_address, which is not set"})
	}
	if c.Traces.Endpoint != "" {
		checks = append(checks, hostPort("traces.endpoint", c.Traces.Endpoint))
	}
	if r := c.Traces.SampleRatio; !(r >= 0 && r <= 1) {
		checks = append(checks, &ValueError{"traces.sample_ratio", fmt.Sprintf("%v is not between 0 and 1", r)})
	}
	return checks
}

func hostPort(key, address string) *ValueError {
	_, port, err := net.SplitHostPort(address)
	if err != nil || port == "" {
		return &ValueError{key, fmt.Sprintf("%q is not HOST:PORT, as in 127.0.0.1:9464", address)}
	}
	return portNumber(key, port, 0)
}

// profilingAddress rejects addresses that other machines could reach: a profile shows what the process holds in
// memory.
func profilingAddress(address string) *ValueError {
	if problem := loopback("profiling", address); problem != nil {
		return &ValueError{"profiling", fmt.Sprintf("needs a loopback metrics_address such as 127.0.0.1:9464, not %q: a profile "+
			"shows what the process is doing", address)}
	}
	return nil
}
