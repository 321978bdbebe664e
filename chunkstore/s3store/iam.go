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
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/container-bootfs/bootfs/internal/httpio"
)

const (
	machineService   = "http://169.254.169.254"
	containerService = "http://169.254.170.2"
	// machinePatience is how long the machine's metadata service may take: it
	// is near, or there is none.
	machinePatience = time.Second
	// servicePatience is the same for the others.
	servicePatience = 10 * time.Second
	maxServiceBody  = 64 << 10 // bytes
)

// containerHosts are where a container's credentials may come from without TLS,
// beside the loopback: the addresses of ECS and EKS.
var containerHosts = []string{"169.254.170.2", "169.254.170.23", "fd00:ec2::23"}

// serviceError says that a service gives no credentials.
type serviceError struct {
	service   string
	status    int // of an answer other than 200, else 0
	err       error
	temporary bool
}

func (e *serviceError) Error() string { return fmt.Sprintf("%s: %v", e.service, e.err) }

func (e *serviceError) Unwrap() error { return e.err }

// ask sends a request to a service that gives credentials and returns its
// answer.
func (s Sources) ask(ctx context.Context, patience time.Duration, method, address string, body string, header ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(body))
	if err != nil {
		return nil, errors.New("the address of a service is no URL")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	transport := s.Transport
	if transport == nil {
		t := httpio.NewTransport(1)
		t.Proxy = nil // what is asked here is for us alone
		defer t.CloseIdleConnections()
		transport = t
	}
	service := httpio.HostOf(address)
	var answer []byte
	resp, err := transport.RoundTrip(req) // follows no redirects
	if err == nil {
		defer resp.Body.Close()
		answer, err = io.ReadAll(io.LimitReader(resp.Body, maxServiceBody))
	}
	if err != nil {
		if context.Cause(ctx) == context.DeadlineExceeded {
			err = fmt.Errorf("no answer in %s", patience)
		}
		return nil, &serviceError{service: service, err: err, temporary: true}
	}
	if resp.StatusCode != http.StatusOK {
		e := httpio.Refusal(resp, false)
		if code := readFault(bytes.NewReader(answer)).code; code != "" {
			e.Hint("%s", code)
		}
		return nil, &serviceError{service, e.Status, e, e.Temporary}
	}
	return answer, nil
}

var errNoKeys = errors.New("the answer holds no credentials")

// roleAnswer is how containers' and machines' services answer.
type roleAnswer struct {
	AccessKeyID     string `json:"AccessKeyId"`
	SecretAccessKey string
	Token           string
	Expiration      time.Time
}

func parseRole(service string, answer []byte) (Credentials, bool, error) {
	var r roleAnswer
	if err := json.Unmarshal(answer, &r); err != nil || r.AccessKeyID == "" || r.SecretAccessKey == "" {
		return Credentials{}, false, &serviceError{service: service, err: errNoKeys}
	}
	return Credentials{r.AccessKeyID, r.SecretAccessKey, r.Token, r.Expiration}, true, nil
}

// fromWebIdentity exchanges a token, as Kubernetes mounts it, for credentials.
func (s Sources) fromWebIdentity(ctx context.Context) (Credentials, bool, error) {
	role, file := s.getenv("AWS_ROLE_ARN"), s.getenv("AWS_WEB_IDENTITY_TOKEN_FILE")
	if role == "" || file == "" {
		return Credentials{}, false, nil
	}
	token, err := s.readFile(file)
	if err != nil {
		return Credentials{}, false, err
	}
	session := s.getenv("AWS_ROLE_SESSION_NAME")
	if session == "" {
		session = "bootfs"
	}
	service := s.getenv("AWS_ENDPOINT_URL_STS")
	if service == "" {
		service = "https://sts.amazonaws.com"
		if region := s.region(); region != "" {
			service = "https://sts." + region + ".amazonaws.com"
			if strings.HasPrefix(region, "cn-") {
				service += ".cn"
			}
		}
	}
	form := url.Values{
		"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"},
		"RoleArn": {role}, "RoleSessionName": {session}, "WebIdentityToken": {strings.TrimSpace(string(token))},
	}
	answer, err := s.ask(ctx, servicePatience, http.MethodPost, service+"/", form.Encode(), "Content-Type", "application/x-www-form-urlencoded")
	if err != nil {
		return Credentials{}, false, err
	}
	var c Credentials
	err = readXML(bytes.NewReader(answer), func(path, text string) {
		switch path {
		case "AssumeRoleWithWebIdentityResponse/AssumeRoleWithWebIdentityResult/Credentials/AccessKeyId":
			c.AccessKey = text
		case "AssumeRoleWithWebIdentityResponse/AssumeRoleWithWebIdentityResult/Credentials/SecretAccessKey":
			c.SecretKey = text
		case "AssumeRoleWithWebIdentityResponse/AssumeRoleWithWebIdentityResult/Credentials/SessionToken":
			c.SessionToken = text
		case "AssumeRoleWithWebIdentityResponse/AssumeRoleWithWebIdentityResult/Credentials/Expiration":
			c.Expires, _ = time.Parse(time.RFC3339, text)
		}
	})
	if err != nil || c.AccessKey == "" || c.SecretKey == "" {
		return Credentials{}, false, &serviceError{service: httpio.HostOf(service), err: errNoKeys}
	}
	return c, true, nil
}

// fromContainer asks the service that ECS and EKS name to their containers.
func (s Sources) fromContainer(ctx context.Context) (Credentials, bool, error) {
	address := s.getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI")
	if relative := s.getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"); relative != "" {
		address = containerService + "/" + strings.TrimPrefix(relative, "/")
	}
	if address == "" {
		return Credentials{}, false, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return Credentials{}, false, errors.New("AWS_CONTAINER_CREDENTIALS_FULL_URI: want a URL")
	}
	if u.Scheme != "https" && !httpio.IsLoopback(u.Host) && !slices.ContainsFunc(containerHosts, func(h string) bool { return net.ParseIP(h).Equal(net.ParseIP(u.Hostname())) }) {
		return Credentials{}, false, fmt.Errorf("AWS_CONTAINER_CREDENTIALS_FULL_URI: want https, or a host among 127.0.0.1, %s", strings.Join(containerHosts, ", "))
	}
	var header []string
	token := s.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN")
	if file := s.getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); file != "" {
		b, err := s.readFile(file)
		if err != nil {
			return Credentials{}, false, err
		}
		token = strings.TrimSpace(string(b))
	}
	if token != "" {
		header = []string{"Authorization", token}
	}
	answer, err := s.ask(ctx, servicePatience, http.MethodGet, address, "", header...)
	if err != nil {
		return Credentials{}, false, err
	}
	return parseRole(httpio.HostOf(address), answer)
}

// fromMachine asks the metadata service of EC2. A machine without one, or
// without a role, has no credentials.
func (s Sources) fromMachine(ctx context.Context) (Credentials, bool, error) {
	if strings.EqualFold(s.getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		return Credentials{}, false, nil
	}
	service := strings.TrimSuffix(s.getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT"), "/")
	if service == "" {
		service = machineService
	}
	token, err := s.ask(ctx, machinePatience, http.MethodPut, service+"/latest/api/token", "", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
	if err != nil {
		return Credentials{}, false, ctx.Err()
	}
	get := func(name string) ([]byte, error) {
		return s.ask(ctx, machinePatience, http.MethodGet, service+"/latest/meta-data/iam/security-credentials/"+name, "", "X-Aws-Ec2-Metadata-Token", string(token))
	}
	roles, err := get("")
	if e := (*serviceError)(nil); errors.As(err, &e) && e.status == http.StatusNotFound {
		return Credentials{}, false, nil
	}
	if err != nil {
		return Credentials{}, false, err
	}
	role, _, _ := strings.Cut(strings.TrimSpace(string(roles)), "\n")
	answer, err := get(url.PathEscape(role))
	if err != nil {
		return Credentials{}, false, err
	}
	return parseRole(service, answer)
}
