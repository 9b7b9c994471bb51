package enter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// Request is all that the program does; program/enter.c has the order. The zero value of a field
// means that the step is left out, unless the field says otherwise.
type Request struct {
	// Namespaces are the CLONE_NEW* flags of those to be joined.
	Namespaces uint32
	// Cgroups are the paths of the tasks files of version 1 cgroups, on the host.
	Cgroups []string
	// OOMScoreAdj is written to /proc/PID/oom_score_adj; nil leaves it as streamshim's is.
	OOMScoreAdj *int
	Limits      []Limit
	// SessionKeyring is the name of the keyring to join, keyrings(7); empty keeps streamshim's.
	SessionKeyring  string
	NoNewPrivileges bool
	Umask           *uint32 // nil leaves it as streamshim's is
	// Filters are installed in this order: with NoNewPrivileges just before execve, else before
	// capabilities are dropped.
	Filters []Filter
	// Directory, UID, GID and Groups are as the container's processes see them. They are always set.
	Directory string
	UID, GID  uint32
	Groups    []uint32
	// Capabilities are set unless nil.
	Capabilities *Capabilities
	// AppArmor is the profile of the command.
	AppArmor string
	// Args is the command. The first is searched for in the PATH of Env unless it has a slash.
	Args []string
	Env  []string // NAME=value, passed as it is
	// FindHome adds HOME to Env, from the container's /etc/passwd.
	FindHome bool
}

// Limit is one of setrlimit(2).
type Limit struct {
	Resource   uint32
	Soft, Hard uint64
}

// Filter is one seccomp filter as the kernel takes it: instructions of struct sock_filter, 8 bytes each.
type Filter struct {
	Flags        uint32 // SECCOMP_FILTER_FLAG_*
	Instructions []byte
}

// Capabilities are sets as bit masks, capabilities(7).
type Capabilities struct {
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
	Last                                                 uint32 // the highest that the kernel knows
}

// What follows is the layout in program/enter.c.
const (
	magic   = 0x65747373 // "sste"
	version = 1

	flagNoNewPrivileges   = 1 << 0
	flagSessionKeyring    = 1 << 1
	flagUmask             = 1 << 2
	flagOOMScore          = 1 << 3
	flagFindHome          = 1 << 4
	flagCapabilities      = 1 << 5
	flagExecuteDescriptor = 1 << 6
	flagBeginInCgroup     = 1 << 7

	sizeOffset      = 8 // of the field size
	instructionSize = 8 // of struct sock_filter
)

// encode lays the request out as the program reads it. executeDescriptor has it execute the
// descriptor it is given and not the first argument, beginInCgroup put the command into the cgroup it
// is given.
func (r *Request) encode(executeDescriptor, beginInCgroup bool) ([]byte, error) {
	if len(r.Args) == 0 {
		return nil, errors.New("no command")
	}
	var flags uint32
	for _, f := range []struct {
		set  bool
		flag uint32
	}{
		{r.NoNewPrivileges, flagNoNewPrivileges},
		{r.SessionKeyring != "", flagSessionKeyring},
		{r.Umask != nil, flagUmask},
		{r.OOMScoreAdj != nil, flagOOMScore},
		{r.FindHome, flagFindHome},
		{r.Capabilities != nil, flagCapabilities},
		{executeDescriptor, flagExecuteDescriptor},
		{beginInCgroup, flagBeginInCgroup},
	} {
		if f.set {
			flags |= f.flag
		}
	}
	var umask uint32
	if r.Umask != nil {
		umask = *r.Umask
	}
	oomScore := 0
	if r.OOMScoreAdj != nil {
		oomScore = *r.OOMScoreAdj
	}
	var caps Capabilities
	if r.Capabilities != nil {
		caps = *r.Capabilities
	}
	order := binary.NativeEndian
	b := make([]byte, 0, 4096)
	words := func(values ...uint32) {
		for _, v := range values {
			b = order.AppendUint32(b, v)
		}
	}
	longs := func(values ...uint64) {
		for _, v := range values {
			b = order.AppendUint64(b, v)
		}
	}
	align := func() {
		for len(b)%8 != 0 {
			b = append(b, 0)
		}
	}
	words(magic, version, 0, flags, r.Namespaces, r.UID, r.GID, umask, uint32(int32(oomScore)), caps.Last)
	longs(caps.Bounding, caps.Effective, caps.Permitted, caps.Inheritable, caps.Ambient)
	words(uint32(len(r.Limits)), uint32(len(r.Filters)), uint32(len(r.Groups)), uint32(len(r.Cgroups)), uint32(len(r.Args)), uint32(len(r.Env)))
	align()
	for _, limit := range r.Limits {
		words(limit.Resource, 0)
		longs(limit.Soft, limit.Hard)
	}
	for i, filter := range r.Filters {
		if len(filter.Instructions)%instructionSize != 0 {
			return nil, fmt.Errorf("filter %d has %d bytes, which are no whole instructions", i, len(filter.Instructions))
		}
		align()
		words(filter.Flags, uint32(len(filter.Instructions)/instructionSize))
		b = append(b, filter.Instructions...)
	}
	align()
	words(r.Groups...)
	align()
	for _, list := range [][]string{{r.Directory, r.SessionKeyring, r.AppArmor}, r.Cgroups, r.Args, r.Env} {
		for _, s := range list {
			if err := checkString(s); err != nil {
				return nil, err
			}
			b = append(append(b, s...), 0)
		}
	}
	order.PutUint32(b[sizeOffset:], uint32(len(b)))
	return b, nil
}

func checkString(s string) error {
	if strings.ContainsRune(s, 0) {
		return errors.New("a string of the request contains a NUL byte")
	}
	return nil
}
