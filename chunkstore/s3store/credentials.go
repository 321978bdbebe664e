package s3store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Credentials are what requests are signed with. The zero value is nobody:
// requests are not signed, as public buckets take them.
type Credentials struct {
	AccessKey, SecretKey string
	SessionToken         string    // "" for a user's own keys
	Expires              time.Time // zero: never
}

// Sources are where credentials are looked for, in this order:
//
//  1. the files that Profiles returns;
//  2. S3_ACCESS_KEY, S3_SECRET_KEY and S3_SESSION_TOKEN, as desync has them, or
//     AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN;
//  3. the role that AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE name;
//  4. the profile AWS_PROFILE of AWS_SHARED_CREDENTIALS_FILE;
//  5. the role of the container, at AWS_CONTAINER_CREDENTIALS_FULL_URI or
//     AWS_CONTAINER_CREDENTIALS_RELATIVE_URI;
//  6. the role of the machine, at EC2's metadata service (version 2), unless
//     AWS_EC2_METADATA_DISABLED is true.
//
// Who has none of them is anonymous. The zero value looks where AWS's own tools
// do.
type Sources struct {
	// Profiles returns files in the form of AWS's shared credentials that stand
	// before everything else. nil is none.
	Profiles func() ([]File, error)
	// Getenv reads a variable; nil is os.Getenv.
	Getenv func(name string) string
	// ReadFile reads a file that a variable names; nil is os.ReadFile.
	ReadFile func(name string) ([]byte, error)
	// Transport makes connections to the services that give credentials; nil
	// is one without a proxy.
	Transport http.RoundTripper
}

// File is a file that was read.
type File struct {
	Name string // for messages
	Data []byte
}

// Variables are those of Sources' variables that hold a secret.
var Variables = []string{
	"S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_SESSION_TOKEN",
	"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
}

func (s Sources) getenv(name string) string {
	if s.Getenv != nil {
		return s.Getenv(name)
	}
	return os.Getenv(name)
}

func (s Sources) readFile(name string) ([]byte, error) {
	if s.ReadFile != nil {
		return s.ReadFile(name)
	}
	return os.ReadFile(name)
}

// region returns the region that the variables name, "" if none.
func (s Sources) region() string {
	for _, name := range []string{"S3_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"} {
		if v := s.getenv(name); regionName().MatchString(v) {
			return v
		}
	}
	return ""
}

// find looks for credentials.
func (s Sources) find(ctx context.Context) (Credentials, error) {
	for _, source := range []func(context.Context) (Credentials, bool, error){
		s.fromFiles, s.fromVariables, s.fromWebIdentity, s.fromProfile, s.fromContainer, s.fromMachine,
	} {
		if c, ok, err := source(ctx); ok || err != nil {
			return c, err
		}
	}
	return Credentials{}, nil
}

func (s Sources) fromFiles(context.Context) (Credentials, bool, error) {
	if s.Profiles == nil {
		return Credentials{}, false, nil
	}
	files, err := s.Profiles()
	if err != nil {
		return Credentials{}, false, err
	}
	for _, f := range files {
		all := parseProfiles(f.Data)
		// The variable may be the app's, and mean a file of its own.
		name := s.getenv("AWS_PROFILE")
		if names := slices.Collect(maps.Keys(all)); len(names) == 1 {
			name = names[0]
		} else if all[name] == nil {
			name = "default"
		}
		c, ok, errFile := all.credentials(name, f.Name)
		if ok {
			return c, true, nil
		}
		if err == nil {
			err = errFile
		}
	}
	return Credentials{}, false, err
}

func (s Sources) fromVariables(context.Context) (Credentials, bool, error) {
	for i := 0; i < len(Variables); i += 3 {
		key, secret := s.getenv(Variables[i]), s.getenv(Variables[i+1])
		if key == "" && secret == "" {
			continue
		}
		if key == "" || secret == "" {
			return Credentials{}, false, fmt.Errorf("of %s and %s only one is set", Variables[i], Variables[i+1])
		}
		return Credentials{AccessKey: key, SecretKey: secret, SessionToken: s.getenv(Variables[i+2])}, true, nil
	}
	return Credentials{}, false, nil
}

func (s Sources) fromProfile(context.Context) (Credentials, bool, error) {
	file, name := s.getenv("AWS_SHARED_CREDENTIALS_FILE"), s.getenv("AWS_PROFILE")
	asked := file != "" || name != ""
	if file == "" {
		home := s.getenv("HOME")
		if home == "" {
			return Credentials{}, false, nil
		}
		file = filepath.Join(home, ".aws", "credentials")
	}
	if name == "" {
		name = "default"
	}
	b, err := s.readFile(file)
	if errors.Is(err, fs.ErrNotExist) && !asked {
		return Credentials{}, false, nil
	}
	if err != nil {
		return Credentials{}, false, err
	}
	profiles := parseProfiles(b)
	if profiles[name] == nil && s.getenv("AWS_PROFILE") == "" {
		return Credentials{}, false, nil
	}
	return profiles.credentials(name, file)
}

// profiles are the settings in a file of credentials, by profile.
type profiles map[string]map[string]string

// parseProfiles reads a file of credentials. Lines that it does not understand
// are none of its business.
func parseProfiles(b []byte) profiles {
	all := profiles{}
	var current map[string]string
	lines := bufio.NewScanner(strings.NewReader(string(b)))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if name, ok := strings.CutPrefix(line, "["); ok {
			name, _, _ = strings.Cut(name, "]")
			name = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(name), "profile "))
			if all[name] == nil {
				all[name] = map[string]string{}
			}
			current = all[name]
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if ok && current != nil && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ";") {
			current[strings.ToLower(strings.TrimSpace(name))] = strings.TrimSpace(value)
		}
	}
	return all
}

// credentials returns what stands in a profile. file is for messages.
func (p profiles) credentials(name, file string) (Credentials, bool, error) {
	profile := p[name]
	c := Credentials{AccessKey: profile["aws_access_key_id"], SecretKey: profile["aws_secret_access_key"], SessionToken: profile["aws_session_token"]}
	if c.AccessKey != "" && c.SecretKey != "" {
		return c, true, nil
	}
	if profile == nil {
		names := slices.Sorted(maps.Keys(p))
		return c, false, fmt.Errorf("%s: no profile %q: it has %q", file, name, names[:min(len(names), 20)])
	}
	for _, indirect := range []string{"role_arn", "sso_session", "sso_start_url", "credential_process"} {
		if profile[indirect] != "" {
			return Credentials{}, false, fmt.Errorf("%s: profile %q gets its keys by way of %s, which bootfs cannot: "+
				"set the variables that aws configure export-credentials --format env prints", file, name, indirect)
		}
	}
	return Credentials{}, false, fmt.Errorf("%s: profile %q: want aws_access_key_id and aws_secret_access_key", file, name)
}
