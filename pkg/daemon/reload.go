package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/handover"
)

// reloader applies a changed configuration on SIGHUP.
type reloader struct {
	log   *slog.Logger
	load  func() (config.Config, error)
	apply func(config.Config) error
	// replace hands over to another version if one is installed, and then does not return. If it returns, the configuration
	// is reloaded here.
	replace func(context.Context)
	// current is the configuration in force.
	current atomic.Pointer[config.Config]
}

// run serves signals until the context ends.
func (r *reloader) run(ctx context.Context, hangups <-chan os.Signal) {
	for {
		select {
		case <-hangups:
			notify(r.log, reloading())
			r.replace(ctx)
			r.reload()
			notify(r.log, daemon.SdNotifyReady) // also after a mistake: the old configuration serves
		case <-ctx.Done():
			return
		}
	}
}

// reload applies what can be applied without a restart. An invalid configuration changes nothing.
func (r *reloader) reload() {
	next, err := r.load()
	if err != nil {
		r.log.Error("the configuration was not reloaded, the old one stays", "error", err)
		return
	}
	merged := *r.current.Load()
	changed, needRestart := merged.Reload(next)
	if err := r.apply(merged); err != nil {
		r.log.Error("the configuration was not reloaded, the old one stays", "error", err)
		return
	}
	r.current.Store(&merged)
	warnRemoved(merged, r.log)
	if len(needRestart) > 0 {
		r.log.Warn("some settings were changed that need a restart, or \"streamshim upgrade\"", "keys", strings.Join(needRestart, ", "))
	}
	if len(changed) == 0 {
		r.log.Info("the configuration was read again; nothing that needs no restart has changed")
		return
	}
	r.log.Info("the configuration was reloaded", "changed", strings.Join(changed, ", "))
}

// warnRemoved logs keys in the configuration file that no longer have an effect.
func warnRemoved(c config.Config, log *slog.Logger) {
	for _, what := range c.Removed() {
		log.Warn("take a key out of the configuration that has no effect any more", "key", what)
	}
}

// reloading returns the notification that Type=notify-reload requires at the beginning of a reload (sd_notify(3)).
func reloading() string {
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, int64(handover.Now())/int64(time.Microsecond))
}
