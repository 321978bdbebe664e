package s3store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-bootfs/bootfs/index"
	"github.com/container-bootfs/bootfs/internal/testenv/bounded"
)

func TestSources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("credentials", `
# a comment
; another
stray = 1
[default]
aws_access_key_id=DEFAULT
aws_secret_access_key = a=b/c+d

[ profile work ]
AWS_ACCESS_KEY_ID = WORK
aws_secret_access_key = s
aws_session_token = t
[sso]
sso_session = x
[half]
aws_access_key_id = HALF
`)
	write(".aws/credentials", "[default]\naws_access_key_id = HOME\naws_secret_access_key = s\n")
	only := write("only", "[bootfs]\naws_access_key_id = ONLY\naws_secret_access_key = s\n")
	given := func(files ...string) func() ([]File, error) {
		return func() ([]File, error) {
			var list []File
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					return nil, err
				}
				list = append(list, File{f, b})
			}
			return list, nil
		}
	}
	for _, tt := range []struct {
		name  string
		env   env
		given []string
		want  Credentials
		err   string
	}{
		{"nothing", env{}, nil, Credentials{}, ""},
		{"desync's", env{"S3_ACCESS_KEY": "D", "S3_SECRET_KEY": "s", "AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s"}, nil, Credentials{AccessKey: "D", SecretKey: "s"}, ""},
		{"desync's session", env{"S3_ACCESS_KEY": "D", "S3_SECRET_KEY": "s", "S3_SESSION_TOKEN": "t", "AWS_SESSION_TOKEN": "other"}, nil, Credentials{AccessKey: "D", SecretKey: "s", SessionToken: "t"}, ""},
		{"AWS's", env{"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "work", "AWS_SHARED_CREDENTIALS_FILE": file}, nil, Credentials{AccessKey: "A", SecretKey: "s", SessionToken: "t"}, ""},
		{"half", env{"AWS_ACCESS_KEY_ID": "A"}, nil, Credentials{}, "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY only one is set"},
		{"home", env{"HOME": dir}, nil, Credentials{AccessKey: "HOME", SecretKey: "s"}, ""},
		{"no home", env{"HOME": filepath.Join(dir, "absent")}, nil, Credentials{}, ""},
		{"default profile", env{"AWS_SHARED_CREDENTIALS_FILE": file}, nil, Credentials{AccessKey: "DEFAULT", SecretKey: "a=b/c+d"}, ""},
		{"named profile", env{"AWS_SHARED_CREDENTIALS_FILE": file, "AWS_PROFILE": "work"}, nil, Credentials{AccessKey: "WORK", SecretKey: "s", SessionToken: "t"}, ""},
		{"no such profile", env{"AWS_SHARED_CREDENTIALS_FILE": file, "AWS_PROFILE": "x"}, nil, Credentials{}, `no profile "x": it has ["default" "half" "sso" "work"]`},
		{"no such file", env{"AWS_SHARED_CREDENTIALS_FILE": file + ".gone"}, nil, Credentials{}, "no such file"},
		{"sso", env{"AWS_SHARED_CREDENTIALS_FILE": file, "AWS_PROFILE": "sso"}, nil, Credentials{}, "by way of sso_session, which bootfs cannot: set the variables that aws configure export-credentials"},
		{"half a profile", env{"AWS_SHARED_CREDENTIALS_FILE": file, "AWS_PROFILE": "half"}, nil, Credentials{}, "want aws_access_key_id and aws_secret_access_key"},
		{"given", env{"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s"}, []string{file}, Credentials{AccessKey: "DEFAULT", SecretKey: "a=b/c+d"}, ""},
		{"given, with a profile", env{"AWS_PROFILE": "work"}, []string{file}, Credentials{AccessKey: "WORK", SecretKey: "s", SessionToken: "t"}, ""},
		{"given, with the app's profile", env{"AWS_PROFILE": "apps"}, []string{file}, Credentials{AccessKey: "DEFAULT", SecretKey: "a=b/c+d"}, ""},
		{"given, one profile", env{}, []string{only}, Credentials{AccessKey: "ONLY", SecretKey: "s"}, ""},
		{"given two", env{}, []string{write("empty", ""), only}, Credentials{AccessKey: "ONLY", SecretKey: "s"}, ""},
		{"given nothing of use", env{"AWS_ACCESS_KEY_ID": "A", "AWS_SECRET_ACCESS_KEY": "s"}, []string{write("empty", "")}, Credentials{}, `no profile "default"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := tt.env.sources()
			if tt.given != nil {
				s.Profiles = given(tt.given...)
			}
			got, err := s.find(t.Context())
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %+v, %v, want %+v, %q", got, err, tt.want, tt.err)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

// service is a server that gives credentials.
func service(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

func role(key string, expires time.Time) string {
	b, err := json.Marshal(map[string]any{
		"Code": "Success", "AccessKeyId": key, "SecretAccessKey": "secret", "Token": "token", "Expiration": expires.Format(time.RFC3339),
	})
	if err != nil {
		panic(err)
	}
	return string(b)
}

var nextYear = time.Now().Add(365 * 24 * time.Hour).Truncate(time.Second).UTC()

// TestMachineRole speaks version 2 of EC2's metadata service.
func TestMachineRole(t *testing.T) {
	const token = "AQAA=="
	has := true
	metadata := service(t, func(w http.ResponseWriter, r *http.Request) {
		const creds = "/latest/meta-data/iam/security-credentials/"
		switch {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") != "":
			io.WriteString(w, token)
		case r.Header.Get("X-Aws-Ec2-Metadata-Token") != token:
			w.WriteHeader(http.StatusUnauthorized)
		case r.URL.Path == creds && has:
			io.WriteString(w, "the-role\n")
		case r.URL.Path == creds+"the-role":
			io.WriteString(w, role("MACHINE", nextYear))
		default:
			http.NotFound(w, r)
		}
	})
	machine := env{"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata + "/"}
	want := Credentials{"MACHINE", "secret", "token", nextYear}
	if got, err := machine.sources().find(t.Context()); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	has = false
	if got, err := machine.sources().find(t.Context()); err != nil || got != (Credentials{}) {
		t.Errorf("without a role: got %+v, %v, want nobody", got, err)
	}
	machine["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://127.0.0.1:1"
	if got, err := machine.sources().find(t.Context()); err != nil || got != (Credentials{}) {
		t.Errorf("without a service: got %+v, %v, want nobody", got, err)
	}
	// A service that does not answer costs one pause, not one for each request.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	machine["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://" + silent.Addr().String()
	s := answering(t, machine.sources(), func(w http.ResponseWriter, r *http.Request) { xmlError(w, 403, "<Code>AccessDenied</Code>") })
	start := time.Now()
	for range 5 {
		_, err := s.Get(t.Context(), index.ID{}, nil)
		wantError(t, "Get", err, "no credentials were found", false)
	}
	if took := time.Since(start); took < machinePatience || took > 2*machinePatience {
		t.Errorf("took %s, want one pause of %s", took, machinePatience)
	}
}

// TestLookedForLate: nobody is asked before a request needs credentials, and
// only who comes first in the order.
func TestLookedForLate(t *testing.T) {
	var asked atomic.Int64
	metadata := service(t, func(w http.ResponseWriter, r *http.Request) { asked.Add(1); http.NotFound(w, r) })
	all := env{
		"AWS_EC2_METADATA_DISABLED": "", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata,
		"AWS_CONTAINER_CREDENTIALS_FULL_URI": metadata, "AWS_ENDPOINT_URL_STS": metadata,
	}
	s := answering(t, all.sources(), func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "x") })
	if asked.Load() != 0 {
		t.Error("credentials were looked for when the store was opened")
	}
	all["AWS_ACCESS_KEY_ID"], all["AWS_SECRET_ACCESS_KEY"] = "A", "s"
	if _, err := s.Get(t.Context(), index.ID{}, nil); err != nil || asked.Load() != 0 {
		t.Errorf("%v, %d requests for credentials that the variables have", err, asked.Load())
	}
}

// TestContainerRole asks the service of ECS and EKS.
func TestContainerRole(t *testing.T) {
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("from the file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var authorization string
	address := service(t, func(w http.ResponseWriter, r *http.Request) {
		authorization = r.Host + r.URL.Path + " " + r.Header.Get("Authorization")
		io.WriteString(w, role("CONTAINER", nextYear))
	})
	host := strings.TrimPrefix(address, "http://")
	ecs := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, host)
	}}
	want := Credentials{"CONTAINER", "secret", "token", nextYear}
	for _, tt := range []struct {
		name  string
		env   env
		asked string
		err   string
	}{
		{"ECS", env{"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/1"}, "169.254.170.2/v2/credentials/1 ", ""},
		{"loopback", env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": address + "/p", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "Bearer x"}, host + "/p Bearer x", ""},
		{"EKS", env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token}, "169.254.170.23/v1/credentials from the file", ""},
		{"EKS over IPv6", env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://[fd00:ec2::23]/v1/credentials"}, "[fd00:ec2::23]/v1/credentials ", ""},
		{"elsewhere in the clear", env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/"}, "", "want https, or a host among"},
		{"no token", env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": address, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": token + ".gone"}, "", "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			authorization = ""
			s := tt.env.sources()
			s.Transport = ecs
			got, err := s.find(t.Context())
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || authorization != "" {
					t.Errorf("got %v after asking %q, want %q", err, authorization, tt.err)
				}
			} else if err != nil || got != want || authorization != tt.asked {
				t.Errorf("got %+v, %v from %q, want %+v from %q", got, err, authorization, want, tt.asked)
			}
		})
	}
}

// TestWebIdentity exchanges a token of Kubernetes for credentials.
func TestWebIdentity(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("hidden.jwt\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	answer, status := "", 200
	sts := service(t, func(w http.ResponseWriter, r *http.Request) {
		for name, want := range map[string]string{"Action": "AssumeRoleWithWebIdentity", "RoleArn": "arn:r", "RoleSessionName": "bootfs", "WebIdentityToken": "hidden.jwt"} {
			if got := r.PostFormValue(name); got != want {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
		w.WriteHeader(status)
		io.WriteString(w, answer)
	})
	web := env{"AWS_ROLE_ARN": "arn:r", "AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ENDPOINT_URL_STS": sts}
	answer = `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
  <Credentials><AccessKeyId>WEB</AccessKeyId><SecretAccessKey>secret</SecretAccessKey><SessionToken>token</SessionToken><Expiration>` + nextYear.Format(time.RFC3339) + `</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`
	want := Credentials{"WEB", "secret", "token", nextYear}
	if got, err := web.sources().find(t.Context()); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	answer, status = `<ErrorResponse><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code><Message>hidden.jwt is odd</Message></Error></ErrorResponse>`, 400
	s := answering(t, web.sources(), func(http.ResponseWriter, *http.Request) { t.Error("a request without credentials") })
	_, err := s.Get(t.Context(), index.ID{}, nil)
	wantError(t, "Get", err, "find credentials: "+sts+": 400 Bad Request: InvalidIdentityToken", false)
	answer, status = "", 503
	_, err = s.Get(t.Context(), index.ID{}, nil)
	wantError(t, "Get", err, "find credentials: "+sts+": 503 Service Unavailable", true)
	answer, status = "<html>", 200
	_, err = s.Get(t.Context(), index.ID{}, nil)
	wantError(t, "Get", err, "the answer holds no credentials", false)
}

// TestRenewed: credentials are replaced before they expire; the old ones serve
// on while there are no new ones.
func TestRenewed(t *testing.T) {
	var given atomic.Int64
	fail := atomic.Bool{}
	life := atomic.Int64{}
	life.Store(int64(renewBefore - time.Minute))
	address := service(t, func(w http.ResponseWriter, r *http.Request) {
		if fail.Load() {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		n := given.Add(1)
		io.WriteString(w, role(fmt.Sprintf("KEY%d", n), time.Now().Add(time.Duration(life.Load()))))
	})
	var used atomic.Value
	s := answering(t, env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": address}.sources(), func(w http.ResponseWriter, r *http.Request) {
		_, after, _ := strings.Cut(r.Header.Get("Authorization"), "Credential=")
		key, _, _ := strings.Cut(after, "/")
		used.Store(key)
		io.WriteString(w, "x")
	})
	get := func(want string) {
		t.Helper()
		got, err := s.Get(t.Context(), index.ID{}, nil)
		if err != nil || !bytes.Equal(got, []byte("x")) || used.Load() != want {
			t.Errorf("got %q, %v with %v, want %s", got, err, used.Load(), want)
		}
	}
	get("KEY1")
	get("KEY1") // they are about to expire, but were asked for just now
	later := func() { s.keys.asked = time.Now().Add(-2 * askAgain) }
	later()
	fail.Store(true)
	get("KEY1")
	later()
	fail.Store(false)
	life.Store(int64(time.Hour))
	get("KEY2")
	later()
	get("KEY2")
	if n := given.Load(); n != 2 {
		t.Errorf("asked %d times, want twice", n)
	}
}

// TestHostileServices: what gives credentials is bounded too.
func TestHostileServices(t *testing.T) {
	if !bounded.Test(t) {
		return
	}
	address := service(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, &endless{1 << 30}) })
	redirect := service(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, address, http.StatusFound) })
	for _, a := range []string{address, redirect} {
		start := time.Now()
		_, err := env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": a}.sources().find(t.Context())
		if err == nil || time.Since(start) > time.Minute {
			t.Errorf("%s: got %v in %s", a, err, time.Since(start))
		}
	}
	// Who stops waiting is let go.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	never := service(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	s := answering(t, env{"AWS_CONTAINER_CREDENTIALS_FULL_URI": never}.sources(), func(http.ResponseWriter, *http.Request) {})
	if _, err := s.Get(ctx, index.ID{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func FuzzReadFault(f *testing.F) {
	f.Add([]byte(`<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>m</Message><Region>r</Region></Error>`))
	f.Add([]byte(`<ErrorResponse><Error><Code>X</Code></Error></ErrorResponse>`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got := readFault(bytes.NewReader(b))
		for _, s := range []string{got.code, got.message, got.region, got.endpoint} {
			if len(s) > 200 || strings.ContainsAny(s, "\n\r\x00\x1b") {
				t.Errorf("got %q, which is not fit for a message", s)
			}
		}
	})
}

func FuzzReadPage(f *testing.F) {
	s, err := New("s3+https://h/bucket/p", Options{Sources: env{}.sources()})
	if err != nil {
		f.Fatal(err)
	}
	id := index.ID{1}
	f.Add([]byte("<ListBucketResult><EncodingType>url</EncodingType><Contents><Key>" + escape(s.address.key(id), false) + "</Key><Size>7</Size></Contents><IsTruncated>false</IsTruncated></ListBucketResult>"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := s.readPage(bytes.NewReader(b), "")
		if err != nil {
			return
		}
		last := ""
		for _, e := range p.entries {
			if key := s.address.key(e.ID); key <= last || e.Size < 0 {
				t.Errorf("got %s of %d bytes after %s", key, e.Size, last)
			} else {
				last = key
			}
		}
	})
}
